"""Chains in a graph as Dynamo records it: layers that read each other alone, and what follows the last of them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from tdpass.dynamo.links import Link, argument, mutates, read_link, same_sizes, tensor_of
from tdpass.kernels.conv_chain import MAX_STAGES
from tdpass.kernels.stage import Lanes, stages_of
from tdpass.layers.factor_chain import FACTOR_CHAIN, LINEAR

_SUMS = {operator.add, torch.add, operator.iadd}
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.gelu: "gelu", torch._C._nn.gelu: "gelu", torch._C._nn.silu: "silu",
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """Layers in a row, then optionally: inference batch-norm, `+ residual`, an activation.

    `nodes` are all the calls it stands for, the last is the result.  `bias` belongs to the last layer.  `lanes` is set where
    a fused module chose them already.
    """

    links: tuple[Link, ...]
    nodes: tuple[Node, ...]
    bias: Node | None
    norm: Node | None = None
    residual: Node | None = None
    activation: str = "identity"
    lanes: Lanes | None = None

    @property
    def x(self) -> Node:
        """What it reads."""
        return self.links[0].x

    @property
    def result(self) -> Node:
        """What it answers with."""
        return self.nodes[-1]


def find_chains(graph: Graph, stored: AbstractSet[Node], *, alone: bool = False) -> list[Chain]:
    """Chains of 2 to 6 convolutions or linear layers with weights in `stored`, none of which shares a node with another.

    A convolution alone counts where batch-norm follows it: weights are no constants of the graph, so that nothing else would fold
    the one into the other, or lay the weight out for the kernel once and for all.  A chain is cut where an intermediate is wider than
    both its neighbours: what is narrow between two wide layers is low rank, what is wide between two narrow ones is where one
    low-rank layer ends and the next begins.  With `alone` every layer that is left counts by itself.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    links = {link.nodes[0]: link for node in graph.nodes if (link := read_link(node, stored)) is not None and link.stage is not None}
    following = {link.node: after for link in links.values() if (after := _next(link, links)) is not None}
    inner = {after.node for after in following.values()}
    chains: list[Chain] = []
    taken: set[Node] = set()  # of a sum of two chains one takes it in, and reads the other

    def take(chain: Chain | None) -> None:
        if chain is not None:
            chains.append(chain)
            taken.update(chain.nodes)

    for link in links.values():
        if link.node in inner:
            continue
        row = [link]
        while row[-1].node in following:
            row.append(following[row[-1].node])
        for part in _cut(row):
            take(_whole(part, order, taken))
    for node in graph.nodes:
        take(_fused_module(node, order, taken))
    for link in links.values() if alone else ():
        take(_whole([link], order, taken, alone=True))
    return chains


def _next(link: Link, entries: dict[Node, Link]) -> Link | None:
    """The layer that alone reads this one."""
    if len(link.node.users) != 1 or link.bias is not None:
        return None
    after = entries.get(next(iter(link.node.users)))
    if after is None or after.x is not link.node or after.axes != link.axes or _dtype(after.node) != _dtype(link.node):
        return None
    return after


def _cut(row: Sequence[Link]) -> Iterator[list[Link]]:
    """Parts of a row of layers that may be chains."""
    stages = [link.stage for link in row if link.stage is not None]
    widths = [stages[0].inputs, *(stage.outputs for stage in stages)]
    part: list[Link] = []
    for index, link in enumerate(row):
        part.append(link)
        end = index + 1 == len(row)
        if end or len(part) == MAX_STAGES or widths[index] < widths[index + 1] > widths[index + 2]:
            yield part
            part = []


def _whole(part: Sequence[Link], order: dict[Node, int], taken: AbstractSet[Node], *, alone: bool = False) -> Chain | None:
    """The chain with as much of what follows it as may move into it."""
    nodes = tuple(node for link in part for node in link.nodes)
    bare = Chain(tuple(part), nodes, part[-1].bias)
    for chain in (_extended(bare), _with_norm(bare), bare):
        enough = alone or len(part) > 1 or (chain.norm is not None and part[0].axes)
        if enough and taken.isdisjoint(chain.nodes) and not _crosses_mutation(chain, order):
            return chain
    return None


def _extended(chain: Chain) -> Chain:
    chain = _with_norm(chain)
    chain = _with_sum(chain)
    return _with_activation(chain)


def _with_norm(chain: Chain) -> Chain:
    y = chain.result
    norm, value = _only_user(y), tensor_of(y)
    if norm is None or value is None or norm.target is not F.batch_norm or argument(norm, 0, "input") is not y:
        return chain
    tensors = norm_inputs(norm)
    fits = chain.links[0].axes or value.dim() == 2
    stored = all(node is None or (isinstance(node, Node) and node.op == "placeholder") for node in (*tensors, chain.bias))
    if argument(norm, 5, "training", default=False) or not fits or not stored or None in tensors[:2]:
        return chain
    if isinstance(argument(norm, 7, "eps"), Node):  # a number that Dynamo left open, since models of one class differ in it
        return chain
    return replace(chain, nodes=(*chain.nodes, norm), norm=norm)


def norm_inputs(norm: Node) -> list[Any]:
    """Running mean and variance, scale and shift of a batch-norm call."""
    return [argument(norm, position, name) for position, name in ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))]


def _with_sum(chain: Chain) -> Chain:
    y = chain.result
    total, value = _only_user(y), tensor_of(y)
    if total is None or value is None or total.target not in _SUMS or len(total.args) != 2 or total.kwargs:
        return chain
    first, second = total.args
    other = second if first is y else first
    rest = tensor_of(other)
    if rest is None or other is y or not isinstance(other, Node) or (total.target is operator.iadd and first is not y) or rest.dtype != value.dtype:
        return chain
    if same_sizes(rest.shape, value.shape):
        return replace(chain, nodes=(*chain.nodes, total), residual=other)
    shift = not chain.links[0].axes and other.op == "placeholder" and rest.dim() == 1 and same_sizes(rest.shape, value.shape[-1:])
    if not shift or chain.bias is not None or chain.norm is not None:
        return chain
    return _with_sum(replace(chain, nodes=(*chain.nodes, total), bias=other))


def _with_activation(chain: Chain) -> Chain:
    user = _only_user(chain.result)
    name = None if user is None else _ACTIVATIONS.get(user.target)
    if user is None or name is None or argument(user, 0, "input") is not chain.result or user.kwargs.get("approximate", "none") != "none":
        return chain
    return replace(chain, nodes=(*chain.nodes, user), activation=name)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _crosses_mutation(chain: Chain, order: dict[Node, int]) -> bool:
    """Whether a call between its first and last node, and not its own, may change what the first ones read."""
    own, node = set(chain.nodes), chain.nodes[0]
    while node is not chain.result:
        if node not in own and mutates(node):
            return True
        node = node.next
    return order[chain.nodes[0]] > order[chain.result]


def _fused_module(node: Node, order: dict[Node, int], taken: AbstractSet[Node]) -> Chain | None:
    """The chain that a fused module calls by its factors."""
    if node.op != "call_function" or node.target is not FACTOR_CHAIN:
        return None
    x, factors, bias, integers, activation, lanes = node.args
    if not all(isinstance(factor, Node) and factor.op == "placeholder" for factor in factors):  # type: ignore[union-attr]
        return None
    axes = 0 if lanes == LINEAR else _axes(x) - 2
    links = tuple(
        Link((node,), x, factor, None, axes, stage)  # type: ignore[arg-type]
        for stage, factor in zip(stages_of(integers), factors, strict=True)  # type: ignore[arg-type]
    )
    bare = Chain(links, (node,), bias, activation=str(activation), lanes="channels" if lanes == LINEAR else lanes)  # type: ignore[arg-type]
    whole = _extended(bare) if activation == "identity" else bare
    return bare if _crosses_mutation(whole, order) or not taken.isdisjoint(whole.nodes) else whole


def _axes(node: Any) -> int:
    value = tensor_of(node)
    return 0 if value is None else value.dim()


def _dtype(node: Node) -> torch.dtype | None:
    value = tensor_of(node)
    return None if value is None else value.dtype
