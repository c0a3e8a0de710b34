"""Nodes that hold several projections in one weight, and a layer for each of these in their place."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.formats.geometry import apply_dense
from tdpass.models.abilities import Decline
from tdpass.models.onnx.graph.graphs import nodes_of, opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import constant, to_torch
from tdpass.models.onnx.operators.ops import OnnxOps
from tdpass.models.onnx.rewriting.rewrite import prune_initializers, remove_nodes, take_place
from tdpass.models.onnx.sites.sites import FoundSite
from tdpass.site import Site
from tdpass.tape import Tape, slices_read

Sizes = tuple[int, ...]


def part_names(name: str, sizes: Sizes) -> list[str]:
    """The names of the slices of a site."""
    return [f"{name}.{number}" for number in range(len(sizes))]


@dataclass(frozen=True)
class Undivided:
    """A model before sites of it were divided, and into slices of which sizes they were."""

    model: ir.Model
    shapes: Shapes
    wanted: Mapping[str, Sizes]

    def replaced(self, layers: Container[str]) -> dict[str, Sizes]:
        """Those of which a slice is among the layers."""
        return {
            name: sizes
            for name, sizes in self.wanted.items()
            if any(part in layers for part in part_names(name, sizes))
        }


def slices_wanted(sites: Mapping[str, FoundSite], tape: Tape, decline: Decline) -> dict[str, Sizes]:
    """The linear layers of which the run reads slices apart, where their nodes can be divided."""
    read = {name: () if found.site.axes else slices_read(tape, name) for name, found in sites.items()}
    reasons = {name: _why_whole(sites[name]) for name, sizes in read.items() if sizes}
    for name, reason in reasons.items():
        if reason:
            decline(name, f"not divided: {reason}")
    return {name: read[name] for name, reason in reasons.items() if not reason}


def _why_whole(site: FoundSite) -> str:
    """Why the nodes of a linear layer cannot be divided; empty where they can."""
    uses = site.uses
    swapped = any(use.swap_in is not None or use.swap_out is not None for use in uses)
    reasons = {
        "rows of its weight are looked up": site.site.table,
        "it makes several axes, or sums over them": any(use.contraction is not None for use in uses),
        "its node multiplies from the left": swapped,
        "its node also adds another value": any(use.addend is not None for use in uses),
        "its node does more than multiply": any(use.following is not None or use.node.domain for use in uses),
        "its weight is stored in another type than it is used in": site.kept != site.dtype,
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), "")


def divided(
    model: ir.Model, sites: Mapping[str, FoundSite], wanted: Mapping[str, Sizes], shapes: Shapes
) -> ir.Model:
    """A copy of the model in which these sites are divided into slices of those sizes.

    Every slice is a layer of its own with its own initializers. A Split into just these slices goes; for any
    other reader a Concat makes the whole output again.
    """
    copy = model.clone()
    twins = dict(zip(*map(nodes_of, (model, copy)), strict=True))
    names = FreshNames(copy)
    recorders: list[OnnxOps] = []
    for name, sizes in wanted.items():
        parts = [
            _Part(site, OnnxOps(site.name, opset_of(copy), names, shapes), weight, bias)
            for site, weight, bias in _slices(sites[name], sizes)
        ]
        recorders += [part.ops for part in parts]
        for use in (use.on(twins) for use in sites[name].uses):
            made = [part.layer(use.input.value) for part in parts]
            nodes = [node for part in parts for node in part.ops.take_nodes()]
            for node in nodes:
                node.metadata_props.update(use.node.metadata_props)
            graph = use.node.graph
            assert graph is not None
            graph.insert_before(use.node, nodes)
            _feed(graph, use.output, made, sizes, f"{name}/concat", names, shapes)
            remove_nodes(graph, use.nodes)
    prune_initializers(copy)
    names = FreshNames(copy)  # those of the whole weights are free again
    for value, label in (pair for ops in recorders for pair in ops.constants_read()):
        value.name = names.value(label)
        copy.graph.register_initializer(value)
    return copy


class _Part:
    """The layer of one slice, as `ops` records it."""

    def __init__(self, site: Site, ops: OnnxOps, weight: Tensor, bias: Tensor | None) -> None:
        self.site, self.ops = site, ops
        self.weight = ops.constant("weight", weight)
        self.bias = None if bias is None else ops.constant("bias", bias)

    def layer(self, x: ir.Value) -> ir.Value:
        """What it makes of x."""
        return apply_dense(self.ops, x, self.weight, self.bias, self.site)


def _slices(found: FoundSite, sizes: Sizes) -> Iterator[tuple[Site, Tensor, Tensor | None]]:
    """The site, weight `[o, i]` and bias of every slice."""
    bias = found.bias()
    weights = torch.split(found.weight_view(), list(sizes))
    biases = [None] * len(sizes) if bias is None else torch.split(bias, list(sizes))
    for name, weight, shift in zip(part_names(found.site.name, sizes), weights, biases, strict=True):
        yield replace(found.site, name=name, shape=tuple(weight.shape)), weight, shift


def _feed(
    graph: ir.Graph | ir.Function,
    whole: ir.Value,
    made: Sequence[ir.Value],
    sizes: Sizes,
    name: str,
    names: FreshNames,
    shapes: Shapes,
) -> None:
    """Give the readers of the whole output its slices.

    A Split into these gets each its own, all others get their Concat.
    """
    last = (shapes.rank(whole) or 0) - 1
    for node, _ in list(whole.uses()):
        if _splits(node, sizes, last):
            for old, new in zip(node.outputs, made, strict=True):
                take_place(old, new)
            graph.remove(node, safe=True)
    if not whole.uses() and not whole.is_graph_output():
        return
    joined = ir.node("Concat", list(made), {"axis": last}, name=names.node(name))
    joined.outputs[0].name = names.value(name)
    producer = whole.producer()
    assert producer is not None
    graph.insert_before(producer, joined)
    take_place(whole, joined.outputs[0])


def _splits(node: ir.Node, sizes: Sizes, last: int) -> bool:
    """Whether a node splits the last axis into just these sizes."""
    if node.domain or node.op_type != "Split" or len(node.outputs) != len(sizes):
        return False
    if node.attributes.get_int("axis", 0) not in {-1, last}:
        return False
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        given = constant(node.inputs[1])
        return given is not None and tuple(to_torch(given).tolist()) == sizes
    step = -(-sum(sizes) // len(sizes))  # equal ones but for the last
    equal = [min(step, sum(sizes) - step * place) for place in range(len(sizes))]
    return tuple(node.attributes.get_ints("split", equal)) == sizes
