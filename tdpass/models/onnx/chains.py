"""Finding layers in a row that one fused operator can compute: no bias, and no other reader, between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from tdpass.kernels.conv_chain import MAX_STAGES, MAX_TAPS
from tdpass.kernels.stage import Stage
from tdpass.models.onnx.activations import activation_after, other, sole_reader
from tdpass.models.onnx.fused_ops import FusedOp
from tdpass.models.onnx.shapes import skeleton
from tdpass.models.onnx.tensors import constant, sizes
from tdpass.models.onnx.weight_use import Slot

Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class LayerNode:
    """A Conv, MatMul or Gemm with a constant weight of float32; a Gemm's is stored `[o, i]` where `flipped`."""

    node: ir.Node
    weight: ir.Value
    stage: Stage
    axes: int
    flipped: bool = False
    bias: ir.Value | None = None

    @property
    def linear(self) -> bool:
        """Whether it is a product with a matrix."""
        return self.node.op_type != "Conv"


@dataclass(frozen=True)
class Chain:
    """Layers in a row, what is added to their result, the activation, and the nodes that all of this is now; the last makes `y`."""

    layers: tuple[LayerNode, ...]
    bias: ir.Value | None
    residual: Slot | None
    activation: str
    nodes: tuple[ir.Node, ...]

    @property
    def x(self) -> ir.Value:
        """What the first layer reads."""
        value = self.layers[0].node.inputs[0]
        assert value is not None
        return value

    @property
    def y(self) -> ir.Value:
        """What the last node makes."""
        return self.nodes[-1].outputs[0]

    @property
    def op(self) -> FusedOp:
        """The operator that computes it."""
        return FusedOp(self.layers[0].linear, len(self.layers), self.bias is not None, self.residual is not None, self.activation)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for chains that do the same work on inputs of the same size."""
        return (self.op, self.layers[0].axes, *(layer.stage for layer in self.layers))

    @property
    def label(self) -> str:
        """A name for people: that of the layer the nodes stand for."""
        return (self.layers[0].node.name or self.layers[0].weight.name or self.y.name or "").rpartition("/")[0] or self.layers[0].node.name or str(self.y.name)


def find_chains(model: ir.Model) -> list[Chain]:
    """Chains of two to six layers in the main graph, each as long as it can be, in the order of the graph."""
    known = [axes_of(model, inputs) for inputs in _probes(model)]
    found: list[Chain] = []
    taken: set[ir.Node] = set()
    for node in model.graph:
        layer = None if node in taken else _layer(node)
        if layer is None:
            continue
        layers = [layer]
        while len(layers) < MAX_STAGES and layers[-1].bias is None:
            reader = sole_reader(layers[-1].node.outputs[0])
            following = None if reader is None or reader.inputs[0] is not layers[-1].node.outputs[0] else _layer(reader)
            if following is None or following.linear != layer.linear or following.axes != layer.axes:
                break
            layers.append(following)
        if len(layers) > 1:
            found.append(_with_rest(layers, known))
            taken.update(found[-1].nodes)
    return found


def axes_of(model: ir.Model, inputs: Mapping[str, Axes]) -> dict[str, Axes]:
    """Sizes of all values by name, as far as they follow from those of the model's inputs."""
    proto = skeleton(model)
    for value in proto.graph.input:
        if value.name in inputs:
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, inputs[value.name]))
    declared = [value for value in proto.graph.value_info if all(axis.HasField("dim_value") for axis in value.type.tensor_type.shape.dim)]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(declared)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError):
        return {}
    known: dict[str, Axes] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            known[value.name] = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in value.type.tensor_type.shape.dim)
    return known


def _probes(model: ir.Model) -> list[dict[str, Axes]]:
    """Two choices of sizes for the open axes of the inputs, an even and an odd one: values as large as each other in both always are."""
    probes: list[dict[str, Axes]] = []
    for first in (64, 97):
        numbers: dict[object, int] = {}
        probes.append({})
        for value in model.graph.inputs:
            if value.shape is not None:
                axes = [size if isinstance(size, int) else size.value or object() for size in value.shape.dims]
                probes[-1][value.name or ""] = tuple(axis if isinstance(axis, int) else numbers.setdefault(axis, first + 32 * len(numbers)) for axis in axes)
    return probes


def _layer(node: ir.Node) -> LayerNode | None:
    if node.domain or node.op_type not in ("Conv", "MatMul", "Gemm"):
        return None
    weight = node.inputs[1]
    tensor = constant(weight)
    if weight is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or 0 in sizes(tensor) or constant(node.inputs[0]) is not None:
        return None
    return _conv(node, weight, sizes(tensor)) if node.op_type == "Conv" else _product(node, weight, sizes(tensor))


def _conv(node: ir.Node, weight: ir.Value, shape: tuple[int, ...]) -> LayerNode | None:
    axes, attributes = len(shape) - 2, node.attributes
    pads = list(attributes.get_ints("pads", (0,) * (2 * axes)))
    if axes not in (1, 2) or math.prod(shape[2:]) > MAX_TAPS or attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or min(pads) < 0:
        return None

    def pair(values: tuple[int, ...], rest: int) -> tuple[int, int]:
        height, width = (rest, *values)[-2:]
        return height, width

    groups, ones = attributes.get_int("group", 1), (1,) * axes
    stage = Stage(
        shape[1] * groups, shape[0], groups, pair(shape[2:], 1), pair(tuple(attributes.get_ints("strides", ones)), 1),
        pair(tuple(pads[:axes]), 0), pair(tuple(pads[axes:]), 0), pair(tuple(attributes.get_ints("dilations", ones)), 1),
    )  # fmt: skip
    return LayerNode(node, weight, stage, axes, bias=node.inputs[2] if len(node.inputs) > 2 else None)


def _product(node: ir.Node, weight: ir.Value, shape: tuple[int, ...]) -> LayerNode | None:
    attributes = node.attributes
    flipped = attributes.get_int("transB", 0) == 1
    if len(shape) != 2 or attributes.get_int("transA", 0) != 0 or attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0:
        return None
    inputs, outputs = shape[::-1] if flipped else shape
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not _is_bias(bias, outputs):
        return None
    return LayerNode(node, weight, Stage(inputs, outputs), 0, flipped, bias)


def _with_rest(layers: list[LayerNode], known: Sequence[Mapping[str, Axes]]) -> Chain:
    """The chain with what follows its last layer and has no other reader: bias, sum, activation."""
    last = layers[-1]
    nodes = [layer.node for layer in layers]
    y, bias, residual = last.node.outputs[0], last.bias, None
    add = sole_reader(y, "Add")
    if add is not None and last.linear and bias is None and _is_bias(operand := other(add, y), last.stage.outputs):
        bias, y = operand, add.outputs[0]
        nodes.append(add)
        add = sole_reader(y, "Add")
    if add is not None and _same_size(known, y, operand := other(add, y)):
        residual, y = Slot(add, add.inputs.index(operand)), add.outputs[0]
        nodes.append(add)
    activation, found = activation_after(y)
    return Chain(tuple(layers), bias, residual, activation, (*nodes, *found))


def _is_bias(value: ir.Value | None, outputs: int) -> bool:
    tensor = constant(value)
    return tensor is not None and sizes(tensor) == (outputs,)


def _same_size(known: Sequence[Mapping[str, Axes]], a: ir.Value, b: ir.Value | None) -> bool:
    """Whether both are as large in every case, so that neither is broadcast."""
    if b is None or constant(b) is not None:
        return False
    pairs = [(sizes_of.get(a.name or ""), sizes_of.get(b.name or "")) for sizes_of in known]
    return all(left is not None and left == right and None not in left for left, right in pairs)
