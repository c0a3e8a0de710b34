"""Chains in a graph as Dynamo records it: how its layers, and what follows the last of them, are read."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from tdpass.dynamo.links import read_link
from tdpass.fusing.spec import Chain, Link
from tdpass.kernels.stage import stages_of
from tdpass.layers.factor_chain import FACTOR_CHAIN, LINEAR
from tdpass.models.torch.graphs.graph_calls import (
    activation_of,
    argument,
    movable,
    only_user,
    same_sizes,
    sum_of,
    tensor_of,
)

GraphChain = Chain[Node, Node]


class GraphReader:
    """Reads the layers of a graph whose weights are in `stored`; see `tdpass.fusing.find.Reader`."""

    cuts = True

    def __init__(self, graph: Graph, stored: AbstractSet[Node]) -> None:
        self.graph, self.stored = graph, stored
        self.order = {node: index for index, node in enumerate(graph.nodes)}

    def links(self) -> Iterator[Link[Node, Node]]:
        for node in self.graph.nodes:
            link = read_link(node, self.stored)
            if link is not None:
                yield link

    def following(self, link: Link[Node, Node]) -> Node | None:
        return only_user(link.node)

    def fuses(self, first: Link[Node, Node], second: Link[Node, Node]) -> bool:
        return second.x is first.node and _dtype(second.node) == _dtype(first.node)

    def norm(self, chain: GraphChain) -> GraphChain:
        y = chain.result
        norm, value = only_user(y), tensor_of(y)
        if (
            norm is None
            or value is None
            or norm.target is not F.batch_norm
            or argument(norm, 0, "input") is not y
        ):
            return chain
        tensors = norm_inputs(norm)
        fits = chain.links[0].axes or value.dim() == 2
        stored = all(
            node is None or (isinstance(node, Node) and node.op == "placeholder")
            for node in (*tensors, chain.bias)
        )
        if argument(norm, 5, "training", default=False) or not fits or not stored or None in tensors[:2]:
            return chain
        if isinstance(
            argument(norm, 7, "eps"), Node
        ):  # a number that Dynamo left open, since models of one class differ in it
            return chain
        return replace(chain, nodes=(*chain.nodes, norm), norm=norm)

    def bias(self, chain: GraphChain) -> GraphChain:
        if chain.links[0].axes or chain.bias is not None or chain.norm is not None:
            return chain
        total, other = sum_of(chain.result)
        rest, value = tensor_of(other), tensor_of(chain.result)
        if total is None or rest is None or value is None or other is None or other.op != "placeholder":
            return chain
        shifts = rest.dim() == 1 and same_sizes(rest.shape, value.shape[-1:])
        return replace(chain, nodes=(*chain.nodes, total), bias=other) if shifts else chain

    def residual(self, chain: GraphChain) -> GraphChain:
        total, other = sum_of(chain.result)
        rest, value = tensor_of(other), tensor_of(chain.result)
        if total is None or rest is None or value is None or not same_sizes(rest.shape, value.shape):
            return chain
        return replace(chain, nodes=(*chain.nodes, total), residual=other)

    def activation(self, chain: GraphChain) -> GraphChain:
        user, name = activation_of(chain.result)
        return chain if user is None else replace(chain, nodes=(*chain.nodes, user), activation=name)

    def movable(self, chain: GraphChain) -> bool:
        return self.order[chain.nodes[0]] <= self.order[chain.result] and movable(chain.nodes)

    def fused(self) -> Iterator[GraphChain]:
        """The chains that fused modules call by their factors."""
        for node in self.graph.nodes:
            chain = _fused_module(node)
            if chain is not None:
                yield chain


def norm_inputs(norm: Node) -> list[Any]:
    """Running mean and variance, scale and shift of a batch-norm call."""
    return [
        argument(norm, position, name)
        for position, name in ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
    ]


def _fused_module(node: Node) -> GraphChain | None:
    """The chain that a fused module calls by its factors."""
    if node.op != "call_function" or node.target is not FACTOR_CHAIN:
        return None
    arguments: tuple[Any, ...] = node.args
    x, factors, bias, integers, activation, lanes = arguments
    if not all(isinstance(factor, Node) and factor.op == "placeholder" for factor in factors):
        return None
    axes = 0 if lanes == LINEAR else _axes(x) - 2
    pairs = zip(stages_of(integers), factors, strict=True)
    links = tuple(Link((node,), x, factor, None, axes, stage) for stage, factor in pairs)
    return Chain(
        links, (node,), bias, activation=str(activation), lanes="channels" if lanes == LINEAR else lanes
    )


def _axes(node: Any) -> int:
    value = tensor_of(node)
    return 0 if value is None else value.dim()


def _dtype(node: Node) -> torch.dtype | None:
    value = tensor_of(node)
    return None if value is None else value.dtype
