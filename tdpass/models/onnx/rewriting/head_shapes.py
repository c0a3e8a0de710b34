"""Constants of an ONNX graph that say into what shapes heads are taken apart and joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch

from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import to_torch
from tdpass.models.onnx.rewriting.edits import replace_constant
from tdpass.models.onnx.sites.sites import FoundSite
from tdpass.models.onnx.sites.weight_use import Slot
from tdpass.models.streams import HeadWidth

_SHAPED = frozenset({"Reshape", "Expand"})
_PASSED = _SHAPED | {"Add", "Mul", "Div", "Cast", "Identity", "Transpose", "Unsqueeze", "Squeeze"}


def resize_heads(model: ir.Model, site: FoundSite, name: str, width: HeadWidth) -> None:
    """Let shapes be those of heads of another width, after a layer that makes them or before its reader."""
    for use in site.uses:
        nodes = _after(use.node) if width.rows else iter(())
        for node in (*nodes, *(_before(use.input.value) if width.columns else ())):
            if node.op_type in _SHAPED:
                _reshape(model, node, name, width)


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


def _reshape(model: ir.Model, node: ir.Node, name: str, width: HeadWidth) -> None:
    shape = node.inputs[1]
    maker = None if shape is None else shape.producer()
    if maker is None or maker.op_type != "Concat":
        _put(model, Slot(node, 1), name, width)
        return
    own = _own(model, node, maker)
    for place in reversed(range(len(own.inputs))):  # a head's width comes last
        if _put(model, Slot(own, place), name, width):
            return


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


def _put(model: ir.Model, slot: Slot, name: str, width: HeadWidth) -> bool:
    held = ir.convenience.get_const_tensor(slot.value)
    if held is None:
        return False
    sizes: Sequence[int] = to_torch(held).flatten().tolist()
    for place in reversed(range(len(sizes))):
        new = width.renamed(sizes[place])
        if new is not None:
            resized = torch.tensor([*sizes[:place], new, *sizes[place + 1 :]])
            replace_constant(model, slot, resized, f"{name}.heads")
            return True
    return False
