"""Convolutions whose padding follows from input sizes that are open, behind a Pad that computes it.

`auto_pad=SAME_*` with a stride: `max(0, (ceil(n / s) - 1) s + reach - n)` zeros on an axis of n positions, half
of them before, where `reach = (k - 1) d + 1`. Behind the Pad it is a convolution without padding, of which any
factors are some.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from tdpass.models.onnx.graph.emitting import Emitter
from tdpass.models.onnx.graph.folding import numbers_of
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import sizes
from tdpass.models.onnx.rewriting.rewrite import prune_initializers, remove_nodes

_INTEGER_MAXIMUM = 12  # the opset from which Max takes whole numbers
_MODES = ("SAME_UPPER", "SAME_LOWER")


@dataclass(frozen=True)
class OpenPad:
    """A convolution that reads what was padded: the name of that, and what the convolution had said before."""

    padded: str
    attributes: tuple[ir.Attr, ...]


def open_pads(model: ir.Model, shapes: Shapes) -> list[OpenPad]:
    """Put a Pad before every such convolution of a stored weight, in place."""
    if opset_of(model) < _INTEGER_MAXIMUM:
        return []
    names = FreshNames(model)
    return [
        _padded(model, node, names)
        for graph in list(model.graphs())
        for node in list(graph)
        if not node.domain and node.op_type == "Conv" and _is_open(node, shapes)
    ]


def close_pads(model: ir.Model, opened: Sequence[OpenPad], kept: Container[str]) -> None:
    """Let the convolutions pad by themselves again, in place, but for those that read what is `kept`."""
    by_name = {record.padded: record for record in opened if record.padded not in kept}
    pads = [
        node
        for graph in model.graphs()
        for node in graph
        if node.op_type == "Pad" and node.outputs[0].name in by_name
    ]
    for pad in pads:
        record, users = by_name[str(pad.outputs[0].name)], [use.node for use in pad.outputs[0].uses()]
        if all(user.op_type == "Conv" for user in users):
            for user in users:
                user.replace_input_with(0, pad.inputs[0])
                user.attributes.clear()
                user.attributes.update({said.name: said for said in record.attributes})
            assert pad.graph is not None
            remove_nodes(pad.graph, [pad])
    if pads:
        prune_initializers(model)


def _is_open(node: ir.Node, shapes: Shapes) -> bool:
    x, weight = node.inputs[0], numbers_of(node.inputs[1])
    if x is None or weight is None or node.attributes.get_string("auto_pad", "NOTSET") not in _MODES:
        return False
    known = shapes.of(x)
    axes = len(sizes(weight)) - 2
    strides = node.attributes.get_ints("strides", (1,) * axes)
    size = (None,) * axes if known is None else known[2:]
    return any(step > 1 and length is None for step, length in zip(strides, size, strict=False))


def _padded(model: ir.Model, node: ir.Node, names: FreshNames) -> OpenPad:
    x, weight, graph = node.inputs[0], numbers_of(node.inputs[1]), node.graph
    assert x is not None and weight is not None and graph is not None  # noqa: PT018
    kernel = sizes(weight)[2:]
    axes = len(kernel)
    stride = node.attributes.get_ints("strides", (1,) * axes)
    dilation = node.attributes.get_ints("dilations", (1,) * axes)
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    emit = Emitter(model.graph, names, f"{node.name or node.outputs[0].name}/auto_pad", opset_of(model))

    def ints(*numbers: int) -> ir.Value:
        return emit.ints(numbers)

    steps, one, two = ints(*stride), ints(1), ints(2)
    length = emit("Slice", emit("Shape", x), two, ints(2 + axes))
    windows = emit("Div", emit("Sub", emit("Add", length, steps), one), steps)
    reach = ints(*((taps - 1) * apart + 1 for taps, apart in zip(kernel, dilation, strict=True)))
    covered = emit("Add", emit("Mul", emit("Sub", windows, one), steps), reach)
    total = emit("Max", emit("Sub", covered, length), ints(0))
    small = emit("Div", total, two)
    large = emit("Sub", total, small)
    before, after = (small, large) if mode == "SAME_UPPER" else (large, small)
    padded = emit("Pad", x, emit("Concat", ints(0, 0), before, ints(0, 0), after, axis=0))
    if x.shape is not None:
        padded.shape = ir.Shape([*x.shape[:2], *(None,) * axes])
    padded.type = x.type
    said = tuple(node.attributes.values())
    graph.insert_before(node, emit.take())
    node.replace_input_with(0, padded)
    for name in ("auto_pad", "pads"):
        node.attributes.pop(name, None)
    return OpenPad(str(padded.name), said)
