"""Constants of an ONNX graph that say into what shapes heads are taken apart and joined."""

from __future__ import annotations

from collections.abc import Iterator

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


def resize_heads(model: ir.Model, site: FoundSite, name: str, change: HeadChange) -> None:
    """Let shapes be those of the heads that there are, after a layer that makes them or before its reader."""
    for use in site.uses:
        nodes = _after(use.node) if change.made else iter(())
        for node in (*nodes, *(_before(use.input.value) if change.read else ())):
            if node.op_type in _SHAPED:
                _reshape(model, node, name, change)


def _after(node: ir.Node) -> Iterator[ir.Node]:
    ahead, seen = [*_readers(node)], set[ir.Node]()
    while ahead:
        found = ahead.pop()
        if found in seen or found.op_type not in _PASSED or found.domain:
            continue
        seen.add(found)
        yield found
        ahead += _readers(found)


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    return (
        reader
        for value in node.outputs
        for reader, place in value.uses()
        if place == 0 or reader.op_type in {"Add", "Mul"}
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
