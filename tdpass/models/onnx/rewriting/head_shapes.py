"""Constants of an ONNX graph that say into what shapes heads are taken apart and joined, and where cut."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import onnx_ir as ir
import torch

from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import to_torch
from tdpass.models.onnx.rewriting.edits import replace_constant
from tdpass.models.onnx.sites.sites import FoundSite
from tdpass.models.onnx.sites.weight_use import Slot
from tdpass.models.streams import HeadChange

_SHAPED = frozenset({"Reshape", "Expand"})
_PASSED = _SHAPED | {"Add", "Mul", "Div", "Cast", "Identity", "Transpose", "Unsqueeze", "Squeeze"}
_TURNING = frozenset({"Slice", "Split", "Neg", "Sub", "Concat"})
_SEVERAL = frozenset({"Add", "Mul", "Sub", "Concat"})


def resize_heads(model: ir.Model, site: FoundSite, name: str, change: HeadChange) -> None:
    """Let shapes be those of the heads that there are, after a layer that makes them or before its reader."""
    passed = _PASSED | _TURNING if change.kept else _PASSED
    for use in site.uses:
        nodes = _after(use.node, passed) if change.made else iter(())
        for node in (*nodes, *(_before(use.input.value) if change.read else ())):
            if node.op_type in _SHAPED:
                _reshape(model, node, name, change)
            elif node.op_type == "Slice" and _of_channels(node, change):
                _slice(model, node, name, change.kept)
            elif node.op_type == "Split" and _of_channels(node, change):
                _split(model, node, name, change.kept)


def _after(node: ir.Node, passed: frozenset[str]) -> Iterator[ir.Node]:
    ahead, seen = [*_readers(node)], set[ir.Node]()
    while ahead:
        found = ahead.pop()
        if found in seen or found.op_type not in passed or found.domain:
            continue
        seen.add(found)
        yield found
        ahead += _readers(found)


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    return (
        reader
        for value in node.outputs
        for reader, place in value.uses()
        if place == 0 or reader.op_type in _SEVERAL
    )


def _before(value: ir.Value | None) -> Iterator[ir.Node]:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _PASSED and not node.domain:
        yield node
        node = None if node.inputs[0] is None else node.inputs[0].producer()


def _reshape(model: ir.Model, node: ir.Node, name: str, change: HeadChange) -> None:
    shape = node.inputs[1]
    maker = None if shape is None else shape.producer()
    joined = None if maker is None or maker.op_type != "Concat" else maker
    parts = [_sizes(value) for value in ([shape] if joined is None else joined.inputs)]
    before = [size for sizes in parts for size in sizes]
    after = change.reshaped(before)
    if after is None or after == before:
        return
    reader, at = node if joined is None else _own(model, node, joined), 0
    for index, sizes in enumerate(parts):
        now = after[at : at + len(sizes)]
        at += len(sizes)
        if now != sizes:
            slot = Slot(reader, 1 if joined is None else index)
            replace_constant(model, slot, torch.tensor(now), f"{name}.heads")


def _slice(model: ir.Model, node: ir.Node, name: str, kept: Sequence[int]) -> None:
    """Let a node cut channels of a head where those lie that stay."""
    left_out: list[int | None] = [None]
    starts, ends, axes, steps = [*map(_sizes, node.inputs[1:]), left_out, left_out][:4]
    lasts = [axis in _last_axis(node) for axis in axes]
    if len(starts) != len(lasts) or any(step not in {1, None} for step in steps):
        return
    for index, before in ((1, starts), (2, ends)):
        after = [
            _cut(kept, at) if last and at is not None else at for last, at in zip(lasts, before, strict=True)
        ]
        if after != before:
            replace_constant(model, Slot(node, index), torch.tensor(after), f"{name}.heads")


def _split(model: ir.Model, node: ir.Node, name: str, kept: Sequence[int]) -> None:
    """Let the parts that a head is split into be of the channels that stay."""
    sizes = _sizes(node.inputs[1]) if len(node.inputs) > 1 else [None]
    if None in sizes or node.attributes.get_int("axis", 0) not in _last_axis(node):
        return
    borders = [_cut(kept, at) for at in accumulate([size or 0 for size in sizes], initial=0)]
    after = [stop - start for start, stop in pairwise(borders)]
    replace_constant(model, Slot(node, 1), torch.tensor(after), f"{name}.heads")


def _of_channels(node: ir.Node, change: HeadChange) -> bool:
    """Whether the last axis of what a node reads is the channels of a head, or those that are turned."""
    read = node.inputs[0]
    last = None if read is None or not read.shape else read.shape[-1]
    return isinstance(last, int) and last in {*change.sizes, *change.turned}


def _last_axis(node: ir.Node) -> set[int]:
    read = node.inputs[0]
    return {-1} if read is None or read.shape is None else {-1, len(read.shape) - 1}


def _cut(kept: Sequence[int], at: int) -> int:
    """How many channels of a head stay before the one at that place; from its end on as it is."""
    return at if at < 0 else bisect_left(kept, at)


def _sizes(value: ir.Value | None) -> list[int | None]:
    """The sizes that a constant holds; one that is not known for a part of a shape that is computed."""
    held = None if value is None else ir.convenience.get_const_tensor(value)
    return [None] if held is None else [int(size) for size in to_torch(held).flatten().tolist()]


def _own(model: ir.Model, node: ir.Node, maker: ir.Node) -> ir.Node:
    """The node that joins the shape of this one alone: others may read the same."""
    if len(maker.outputs[0].uses()) == 1:
        return maker
    names = FreshNames(model)
    axis = maker.attributes.get_int("axis", 0)
    own = ir.node("Concat", maker.inputs, {"axis": axis}, name=names.node(f"{node.name}/shape"))
    made, old = own.outputs[0], maker.outputs[0]
    made.name, made.shape, made.type = names.value(f"{node.name}/shape"), old.shape, old.type
    assert node.graph is not None
    node.graph.insert_before(node, own)
    node.replace_input_with(1, made)
    return own
