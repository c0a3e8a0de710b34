"""ONNX models whose weights and activations are integers, as models of floating-point numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from tdpass.errors import InvalidModelError, UnsupportedError
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import constant, from_torch
from tdpass.models.onnx.rewriting.dynamic_lstm import plain_lstms
from tdpass.models.onnx.rewriting.plain_products import plain_products
from tdpass.models.onnx.rewriting.rewrite import prune_initializers, take_place

_MOVES = frozenset({"Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Slice", "Gather"})
_MEANS = frozenset({"AveragePool", "GlobalAveragePool"})
_POSITIVE = frozenset({"Relu", "Sigmoid", "Softmax", "Clip", "Abs"})
_CLIP_WITH_INPUTS = 11


@dataclass(frozen=True)
class _WithIntegers:
    """An operator on integers with their scales and zero points, as the one on numbers it stands for.

    `read` are the places of what it reads, each with its scale and zero point: `(x, scale, zero)`; `made` the
    places of scale and zero point of its output, `bias` that of integers at the scale of the two products.
    """

    operator: str
    read: tuple[tuple[int, int, int], ...]
    made: tuple[int, int]
    bias: int | None = None


_X, _W = (0, 1, 2), (3, 4, 5)
_OPERATORS = {
    "QLinearConv": _WithIntegers("Conv", (_X, _W), (6, 7), 8),
    "QLinearMatMul": _WithIntegers("MatMul", (_X, _W), (6, 7)),
    "com.microsoft::QGemm": _WithIntegers("Gemm", (_X, _W), (7, 8), 6),
    "com.microsoft::QLinearAdd": _WithIntegers("Add", (_X, _W), (6, 7)),
    "com.microsoft::QLinearMul": _WithIntegers("Mul", (_X, _W), (6, 7)),
    "com.microsoft::QLinearSigmoid": _WithIntegers("Sigmoid", (_X,), (3, 4)),
    "com.microsoft::QLinearLeakyRelu": _WithIntegers("LeakyRelu", (_X,), (3, 4)),
    "com.microsoft::QLinearGlobalAveragePool": _WithIntegers("GlobalAveragePool", (_X,), (3, 4)),
    "com.microsoft::QLinearAveragePool": _WithIntegers("AveragePool", (_X,), (3, 4)),
}


def dequantized(model: ir.Model) -> int:
    """Let the model, changed in place, compute in floating point; returns how many tensors were integers.

    Constants become the numbers that they stand for.  What is rounded on its way is passed on as it is; where
    its range begins at zero, as behind an activation that was left out for that, it is cut there and at the
    range's end.  Raises `UnsupportedError` for integers in another graph than the main one.
    """
    inner = [graph for graph in model.graphs() if graph is not model.graph]
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for graph in inner for node in graph):
        raise UnsupportedError(
            "a branch, loop or function of the model holds integers, which stay; quantize the floating-point "
            "model without them"
        )
    names = FreshNames(model)
    for node in list(model.graph):
        known = _OPERATORS.get(f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
        if known is not None:
            _spelled_out(model, node, known, names)
    count = plain_lstms(model) + plain_products(model)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and not node.domain and _constants(node) is not None:
            _fold(model, node, names)
            count += 1
        elif node.op_type == "DequantizeLinear" and not node.domain and _moves(node):
            _fold_before_moves(model, node, _moves(node), names)
            count += 1
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear" and not node.domain and _only_passed_on(node.outputs[0]):
            _passed_on(model, node, names)
            count += 1
    prune_initializers(model)
    return count


def _spelled_out(model: ir.Model, node: ir.Node, known: _WithIntegers, names: FreshNames) -> None:
    """Numbers of the integers, the operator, integers of the result."""
    kind = node.attributes
    numbers = [_numbers(model, node, [node.inputs[k] for k in places], names) for places in known.read]
    bias = node.inputs[known.bias] if known.bias is not None and known.bias < len(node.inputs) else None
    if bias is not None:
        scale = _product_of_scales(node, known, names, model)
        numbers.append(_numbers(model, node, [bias, scale, None], names, axis=0))
    attributes = {name: held for name, held in kind.items() if name != "channels_last"}
    plain = ir.node(known.operator, numbers, attributes=attributes, name=names.node(f"{node.name}/float"))
    _typed(plain, names, ir.DataType.FLOAT, node.outputs[0])
    coded = ir.node("QuantizeLinear", [plain.outputs[0], *(node.inputs[k] for k in known.made)])
    coded.name = names.node(f"{node.name}/quantize")
    model.graph.insert_before(node, [plain, coded])
    old = node.outputs[0]
    wanted, old.name = old.name, None
    old.replace_all_uses_with(coded.outputs[0], replace_graph_outputs=True)
    made = coded.outputs[0]
    made.name, made.type, made.shape = wanted, old.type, None if old.type is None else old.shape
    model.graph.remove(node, safe=True)


def _numbers(
    model: ir.Model,
    node: ir.Node,
    read: Sequence[ir.Value | None],
    names: FreshNames,
    axis: int | None = None,
) -> ir.Value:
    """The numbers of integers with scale and zero point.

    A weight has a scale per channel along its first axis, or its last.
    """
    values, scale, zero = read
    held = constant(scale)
    per_channel = held is not None and held.size > 1
    by_column = node.op_type in ("QLinearMatMul", "QGemm") and not node.attributes.get_int("transB", 0)
    along = int(by_column) if axis is None else axis
    made = ir.node(
        "DequantizeLinear",
        [values, scale] if zero is None else [values, scale, zero],
        attributes={"axis": along} if per_channel else {},
        name=names.node(f"{node.name}/dequantize"),
    )
    _typed(made, names, ir.DataType.FLOAT, values)
    model.graph.insert_before(node, made)
    return made.outputs[0]


def _product_of_scales(node: ir.Node, known: _WithIntegers, names: FreshNames, model: ir.Model) -> ir.Value:
    held = [constant(node.inputs[places[1]]) for places in known.read]
    if any(tensor is None for tensor in held):
        raise InvalidModelError(
            f"the scales of {node.name!r} are no constants, so its bias has none; quantize the model again"
        )
    first, second = (torch.from_numpy(np.array(tensor.numpy())) for tensor in held if tensor is not None)
    scale = node.attributes.get_float("alpha", 1.0)
    return _register(model, f"{node.name}/bias_scale", (scale * first * second).float(), names)


def _constants(node: ir.Node) -> list[ir.TensorProtocol | None] | None:
    """Values, scale and zero point where all that are there are constants."""
    held = [None if value is None else constant(value) for value in node.inputs]
    present = [tensor for value, tensor in zip(node.inputs, held, strict=True) if value is not None]
    return held if all(tensor is not None for tensor in present) else None


def _fold(model: ir.Model, node: ir.Node, names: FreshNames) -> None:
    """The numbers of constant integers as a constant."""
    made = _numbers_of(model, node, node.inputs[0], names)
    node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _moves(node: ir.Node) -> list[ir.Node]:
    """The nodes that only move constant integers with one scale before numbers are made of them, last first."""
    beside = [constant(value) for value in node.inputs[1:] if value is not None]
    value, found = node.inputs[0], list[ir.Node]()
    while value is not None and constant(value) is None:
        maker = value.producer()
        if maker is None or maker.domain or maker.op_type not in _MOVES or len(value.uses()) > 1:
            return []
        found.append(maker)
        value = maker.inputs[0]
    return found if value is not None and all(held is not None and held.size == 1 for held in beside) else []


def _fold_before_moves(model: ir.Model, node: ir.Node, moves: Sequence[ir.Node], names: FreshNames) -> None:
    """The numbers of constant integers as a constant that is moved in place of these."""
    moves[-1].replace_input_with(0, _numbers_of(model, node, moves[-1].inputs[0], names))
    for move in moves:
        move.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    _end(model, node, moves[0].outputs[0])


def _numbers_of(model: ir.Model, node: ir.Node, source: ir.Value | None, names: FreshNames) -> ir.Value:
    """The numbers that a node makes, or would make, of these constant integers, as a constant."""
    values, scale, zero = (*map(constant, (source, *node.inputs[1:])), None)[:3]
    assert values is not None
    assert scale is not None
    codes, steps = values.numpy().astype(np.float64), scale.numpy().astype(np.float64)
    zeros = np.zeros_like(steps) if zero is None else zero.numpy().astype(np.float64)
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if block:
        steps, zeros = (np.repeat(part, block, axis) for part in (steps, zeros))
        steps, zeros = (np.take(part, range(codes.shape[axis]), axis) for part in (steps, zeros))
    elif steps.size > 1:
        along = [1] * codes.ndim
        along[axis] = -1
        steps, zeros = steps.reshape(along), zeros.reshape(along)
    numbers = torch.from_numpy((codes - zeros) * steps).float()
    label = str(source.name if source is not None else node.name).removesuffix("_quantized")
    return _register(model, label, numbers, names)


def _only_passed_on(codes: ir.Value) -> bool:
    """Whether integers are only moved before numbers are made of them again."""
    if codes.is_graph_output():
        return False
    for node, place in codes.uses():
        passes = node.op_type in _MOVES and not node.domain and place == 0
        if node.op_type != "DequantizeLinear" and not (passes and _only_passed_on(node.outputs[0])):
            return False
    return True


def _passed_on(model: ir.Model, node: ir.Node, names: FreshNames) -> None:
    """What was rounded, as it is, to where it is made numbers of."""
    value = node.inputs[0]
    assert value is not None
    end = _end_of_range(node)
    if end is not None and not _is_positive(value):
        value = _cut(model, node, value, end, names)
    _replace_numbers(model, node.outputs[0], value)
    model.graph.remove(node, safe=True)


def _replace_numbers(model: ir.Model, codes: ir.Value, numbers: ir.Value) -> None:
    for node, place in list(codes.uses()):
        if node.op_type == "DequantizeLinear":
            _end(model, node, numbers)
        else:
            node.replace_input_with(place, numbers)
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            _replace_numbers(model, node.outputs[0], node.outputs[0])


def _end(model: ir.Model, node: ir.Node, numbers: ir.Value) -> None:
    """Numbers in the place of those that a node makes of integers; what the model returns keeps its name."""
    made = node.outputs[0]
    if made.is_graph_output():
        copied = ir.node("Identity", [numbers], name=f"{node.name}/identity")
        model.graph.insert_before(node, copied)
        take_place(made, copied.outputs[0])
    else:
        made.replace_all_uses_with(numbers)
    model.graph.remove(node, safe=True)


def _is_positive(value: ir.Value) -> bool:
    """Whether an activation made it, and what came after only moved or averaged."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES | _MEANS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in _POSITIVE


def _end_of_range(node: ir.Node) -> float | None:
    """The largest number of a range that begins at zero; None for any other range."""
    held = [constant(value) for value in node.inputs[1:3]]
    if len(held) < 2 or held[0] is None or held[1] is None or held[0].size != 1:
        return None
    zero = held[1].numpy()
    limits = np.iinfo(np.uint8 if held[1].dtype == ir.DataType.UINT8 else np.int8)
    if held[1].dtype not in (ir.DataType.UINT8, ir.DataType.INT8) or int(zero.reshape(-1)[0]) != limits.min:
        return None
    return float(held[0].numpy().reshape(-1)[0]) * (int(limits.max) - int(limits.min))


def _cut(model: ir.Model, node: ir.Node, value: ir.Value, end: float, names: FreshNames) -> ir.Value:
    if opset_of(model) < _CLIP_WITH_INPUTS:
        clip = ir.node("Clip", [value], attributes={"min": 0.0, "max": end})
    else:
        ends = [_register(model, f"{node.name}/end", torch.tensor(at), names) for at in (0.0, end)]
        clip = ir.node("Clip", [value, *ends])
    clip.name = names.node(f"{node.name}/clip")
    _typed(clip, names, ir.DataType.FLOAT, value)
    model.graph.insert_before(node, clip)
    return clip.outputs[0]


def _typed(node: ir.Node, names: FreshNames, dtype: ir.DataType, like: ir.Value | None) -> None:
    node.outputs[0].name, node.outputs[0].type = names.value(str(node.name)), ir.TensorType(dtype)
    node.outputs[0].shape = None if like is None else like.shape


def _register(model: ir.Model, wanted: str, tensor: torch.Tensor, names: FreshNames) -> ir.Value:
    held = from_torch(tensor.contiguous())
    value = ir.Value(
        name=names.value(wanted),
        shape=ir.Shape(list(tensor.shape)),
        type=ir.TensorType(held.dtype),
        const_value=held,
    )
    model.graph.register_initializer(value)
    return value
