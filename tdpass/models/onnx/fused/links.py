"""Chains in an ONNX graph: how its layers, and what follows the last of them, are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import onnx
import onnx_ir as ir

from tdpass.fusing.spec import Chain, Link
from tdpass.kernels.conv_chain import MAX_TAPS
from tdpass.kernels.stage import Stage
from tdpass.models.onnx.graph.activations import activation_after, other, sole_reader
from tdpass.models.onnx.graph.shapes import skeleton
from tdpass.models.onnx.graph.tensors import constant, sizes
from tdpass.models.onnx.sites.weight_use import Slot

Axes = tuple[int | None, ...]
NodeLink = Link[ir.Node, Slot]
NodeChain = Chain[ir.Node, Slot]


class NodeReader:
    """Reads layers of the main graph whose weights are constants of float32.

    A `tdpass.fusing.find.Reader`.
    """

    cuts = False

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    @cached_property
    def _sizes(self) -> list[dict[str, Axes]]:
        """Sizes of all values by name, for two choices of the open axes."""
        return [axes_of(self.model, inputs) for inputs in _probes(self.model)]

    def links(self) -> Iterator[NodeLink]:
        for node in self.model.graph:
            weight = constant(node.inputs[1]) if len(node.inputs) > 1 else None
            if weight is not None and weight.dtype == ir.DataType.FLOAT:
                link = layer_of(node, sizes(weight))
                if link is not None:
                    yield link

    def following(self, link: NodeLink) -> ir.Node | None:
        return sole_reader(link.node.outputs[0])

    def fuses(self, first: NodeLink, second: NodeLink) -> bool:
        return second.node.inputs[0] is first.node.outputs[0]

    def norm(self, chain: NodeChain) -> NodeChain:
        """The chain: batch-norms of constants are folded before."""
        return chain

    def bias(self, chain: NodeChain) -> NodeChain:
        add, slot = _sum(result(chain))
        if (
            add is None
            or slot is None
            or chain.links[0].axes
            or chain.bias is not None
            or not _is_bias(slot.value, outputs_of(chain))
        ):
            return chain
        return replace(chain, nodes=(*chain.nodes, add), bias=slot)

    def residual(self, chain: NodeChain) -> NodeChain:
        add, slot = _sum(result(chain))
        if add is None or slot is None or not self._same_size(result(chain), slot.value):
            return chain
        return replace(chain, nodes=(*chain.nodes, add), residual=slot)

    def activation(self, chain: NodeChain) -> NodeChain:
        name, nodes = activation_after(result(chain))
        return replace(chain, nodes=(*chain.nodes, *nodes), activation=name)

    def movable(self, chain: NodeChain) -> bool:
        return True

    def fused(self) -> Iterator[NodeChain]:
        """None: operators that were fused before are read as what they are."""
        yield from ()

    def _same_size(self, a: ir.Value, b: ir.Value) -> bool:
        """Whether both are as large in every case, so that neither is broadcast."""
        if constant(b) is not None:
            return False
        pairs = [(known.get(a.name or ""), known.get(b.name or "")) for known in self._sizes]
        return all(left is not None and left == right and None not in left for left, right in pairs)


def result(chain: NodeChain) -> ir.Value:
    """What the last node of a chain makes."""
    return chain.result.outputs[0]


def outputs_of(chain: NodeChain) -> int:
    """How many channels a chain makes."""
    return chain.spec.stages[-1].outputs


def label(chain: NodeChain) -> str:
    """A name for people: that of the layer the nodes stand for."""
    first = chain.links[0]
    named = (first.node.name or first.weight.value.name or result(chain).name or "").rpartition("/")[0]
    return named or first.node.name or str(result(chain).name)


def axes_of(model: ir.Model, inputs: Mapping[str, Axes]) -> dict[str, Axes]:
    """Sizes of all values by name, as far as they follow from those of the model's inputs."""
    proto = skeleton(model)
    for value in proto.graph.input:
        if value.name in inputs:
            value.CopyFrom(
                onnx.helper.make_tensor_value_info(
                    value.name, value.type.tensor_type.elem_type, inputs[value.name]
                )
            )
    declared = [
        value
        for value in proto.graph.value_info
        if all(axis.HasField("dim_value") for axis in value.type.tensor_type.shape.dim)
    ]
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
            known[value.name] = tuple(
                axis.dim_value if axis.HasField("dim_value") else None
                for axis in value.type.tensor_type.shape.dim
            )
    return known


def _probes(model: ir.Model) -> list[dict[str, Axes]]:
    """Two choices of sizes for the open axes of the inputs, an even and an odd one.

    Values that are as large as each other in both always are.
    """
    probes: list[dict[str, Axes]] = []
    for first in (64, 97):
        numbers: dict[object, int] = {}
        probes.append({})
        for value in model.graph.inputs:
            if value.shape is not None:
                axes = [
                    size if isinstance(size, int) else size.value or object() for size in value.shape.dims
                ]
                probes[-1][value.name or ""] = tuple(
                    axis if isinstance(axis, int) else numbers.setdefault(axis, first + 32 * len(numbers))
                    for axis in axes
                )
    return probes


def layer_of(node: ir.Node, shape: tuple[int, ...]) -> NodeLink | None:
    """A convolution or product with a weight of these sizes as a layer; None where no kernel computes it."""
    if node.domain or node.op_type not in ("Conv", "MatMul", "Gemm") or 0 in shape:
        return None
    if constant(node.inputs[0]) is not None:
        return None
    return _conv(node, shape) if node.op_type == "Conv" else _product(node, shape)


def _conv(node: ir.Node, shape: tuple[int, ...]) -> NodeLink | None:
    stage = conv_stage(node, shape)
    if stage is None:
        return None
    return Link((node,), Slot(node, 0), Slot(node, 1), _bias(node), len(shape) - 2, stage)


def conv_stage(node: ir.Node, shape: tuple[int, ...]) -> Stage | None:
    """A convolution with a weight of these sizes as a stage; None where no kernel computes it."""
    axes, attributes = len(shape) - 2, node.attributes
    pads = list(attributes.get_ints("pads", (0,) * (2 * axes)))
    if (
        axes not in (1, 2)
        or math.prod(shape[2:]) > MAX_TAPS
        or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        or min(pads) < 0
    ):
        return None

    def pair(values: tuple[int, ...], rest: int) -> tuple[int, int]:
        height, width = (rest, *values)[-2:]
        return height, width

    groups, ones = attributes.get_int("group", 1), (1,) * axes
    return Stage(
        shape[1] * groups, shape[0], groups, pair(shape[2:], 1),
        pair(tuple(attributes.get_ints("strides", ones)), 1),
        pair(tuple(pads[:axes]), 0), pair(tuple(pads[axes:]), 0),
        pair(tuple(attributes.get_ints("dilations", ones)), 1),
    )  # fmt: skip


def _product(node: ir.Node, shape: tuple[int, ...]) -> NodeLink | None:
    attributes = node.attributes
    flipped = attributes.get_int("transB", 0) == 1
    if (
        len(shape) != 2
        or attributes.get_int("transA", 0) != 0
        or attributes.get_float("alpha", 1.0) != 1.0
        or attributes.get_float("beta", 1.0) != 1.0
    ):
        return None
    inputs, outputs = shape[::-1] if flipped else shape
    bias = _bias(node)
    if bias is not None and not _is_bias(bias.value, outputs):
        return None
    return Link(
        (node,), Slot(node, 0), Slot(node, 1), bias, 0, Stage(inputs, outputs), transposed=not flipped
    )


def _bias(node: ir.Node) -> Slot | None:
    return Slot(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None


def _sum(y: ir.Value) -> tuple[ir.Node, Slot] | tuple[None, None]:
    """The sum that alone reads a value, and where it reads what it adds; None for none."""
    add = sole_reader(y, "Add")
    operand = None if add is None else other(add, y)
    return (None, None) if add is None or operand is None else (add, Slot(add, add.inputs.index(operand)))


def _is_bias(value: ir.Value, outputs: int) -> bool:
    tensor = constant(value)
    return tensor is not None and sizes(tensor) == (outputs,)
