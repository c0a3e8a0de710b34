"""Chains in a graph as Dynamo records it: how its layers, and what follows the last of them, are read."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from tdpass.dynamo.links import argument, mutates, read_link, same_sizes, tensor_of
from tdpass.fusing.spec import Chain, Link
from tdpass.kernels.stage import stages_of
from tdpass.layers.factor_chain import FACTOR_CHAIN, LINEAR

_SUMS = {operator.add, torch.add, operator.iadd}
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.gelu: "gelu", torch._C._nn.gelu: "gelu", torch._C._nn.silu: "silu",
}  # fmt: skip


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
        return _only_user(link.node)

    def fuses(self, first: Link[Node, Node], second: Link[Node, Node]) -> bool:
        return second.x is first.node and _dtype(second.node) == _dtype(first.node)

    def norm(self, chain: GraphChain) -> GraphChain:
        y = chain.result
        norm, value = _only_user(y), tensor_of(y)
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
        total, other = _sum(chain.result)
        rest, value = tensor_of(other), tensor_of(chain.result)
        if total is None or rest is None or value is None or other is None or other.op != "placeholder":
            return chain
        shifts = rest.dim() == 1 and same_sizes(rest.shape, value.shape[-1:])
        return replace(chain, nodes=(*chain.nodes, total), bias=other) if shifts else chain

    def residual(self, chain: GraphChain) -> GraphChain:
        total, other = _sum(chain.result)
        rest, value = tensor_of(other), tensor_of(chain.result)
        if total is None or rest is None or value is None or not same_sizes(rest.shape, value.shape):
            return chain
        return replace(chain, nodes=(*chain.nodes, total), residual=other)

    def activation(self, chain: GraphChain) -> GraphChain:
        user = _only_user(chain.result)
        name = None if user is None else _ACTIVATIONS.get(user.target)
        if (
            user is None
            or name is None
            or argument(user, 0, "input") is not chain.result
            or user.kwargs.get("approximate", "none") != "none"
        ):
            return chain
        return replace(chain, nodes=(*chain.nodes, user), activation=name)

    def movable(self, chain: GraphChain) -> bool:
        """Whether no call of others between its first and last node may change what the first ones read."""
        own, node = set(chain.nodes), chain.nodes[0]
        if self.order[node] > self.order[chain.result]:
            return False
        while node is not chain.result:
            if node not in own and mutates(node):
                return False
            node = node.next
        return True

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


def _sum(y: Node) -> tuple[Node, Node] | tuple[None, None]:
    """The sum that alone reads a value, and what it adds to it, in the same type; None for none."""
    total, value = _only_user(y), tensor_of(y)
    if total is None or value is None or total.target not in _SUMS or len(total.args) != 2 or total.kwargs:
        return None, None
    first, second = total.args
    other = second if first is y else first
    rest = tensor_of(other)
    if (
        rest is None
        or other is y
        or not isinstance(other, Node)
        or (total.target is operator.iadd and first is not y)
        or rest.dtype != value.dtype
    ):
        return None, None
    return total, other


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


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
