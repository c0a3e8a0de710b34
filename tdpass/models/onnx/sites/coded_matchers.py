"""Matchers of operators on integers that read their scales: layers on numbers, between integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import onnx_ir as ir
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.kinds import KINDS, PRODUCT
from tdpass.models.onnx.graph.functions import FUNCTIONS, Operator
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import constant, sizes
from tdpass.models.onnx.operators.ops import OnnxOps
from tdpass.models.onnx.sites.matchers import DeclinedNode, matches
from tdpass.models.onnx.sites.weight_use import Slot, Steps, WeightUse

_X, _W, _BY_ROW = 0, 3, 13
S = TypeVar("S", bound=Steps)
_OTHER_SCALES = (
    "the weight is quantized with scales that are computed while it runs, or in another way than by output "
    "channel; compress the floating-point model, then quantize it"
)


@dataclass(frozen=True)
class Decoded(Steps):
    """The numbers that integers before the layer stand for."""

    def written(self, ops: OnnxOps, y: ir.Value) -> ir.Value:
        scale, zero = self.scale.value, None if self.zero is None else self.zero.value
        return ops.numbers_of_codes(y, scale, zero)

    def computed(self, y: Tensor, values: Mapping[ir.Value, Tensor]) -> Tensor:
        return _computed("DequantizeLinear", y, [values[value] for value in self.reads])


@dataclass(frozen=True)
class Coded(Steps):
    """Numbers behind the layer as integers."""

    def written(self, ops: OnnxOps, y: ir.Value) -> ir.Value:
        assert self.zero is not None
        return ops.quantize(y, self.scale.value, self.zero.value)

    def computed(self, y: Tensor, values: Mapping[ir.Value, Tensor]) -> Tensor:
        return _computed("QuantizeLinear", y, [values[value] for value in self.reads])


def _computed(operator: str, y: Tensor, steps: list[Tensor]) -> Tensor:
    made = FUNCTIONS.get(operator)(Operator(operator, _BY_ROW, {}), y, *steps)
    assert isinstance(made, Tensor)
    return made


def _slot(node: ir.Node, index: int) -> Slot | None:
    return Slot(node, index) if index < len(node.inputs) and node.inputs[index] is not None else None


def _steps(cls: type[S], node: ir.Node, index: int, axis: int = 0) -> S:
    """Scale and zero point that lie at a place and behind it."""
    return cls(Slot(node, index), _slot(node, index + 1), axis)


@dataclass(frozen=True)
class CodedMatcher:
    """An operator `op(x, x_scale, x_zero, w, w_scale, w_zero, ...)` with a constant weight.

    `bias` and `made` are the places of what is added, integers of the scale of the two products, and of the
    output's scale.
    """

    made: int
    bias: int

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        weight, bias = Slot(node, _W), _slot(node, self.bias)
        stored = constant(weight.value)
        if stored is None:
            return None
        use = self.layer(node, weight, sizes(stored), shapes)
        if use is None:
            return None
        coded = _slot(node, self.made)
        use = replace(
            use,
            preceding=_steps(Decoded, node, _X + 1),
            following=None if coded is None else _steps(Coded, node, self.made),
            bias=bias,
            bias_steps=() if bias is None else (Slot(node, _X + 1), Slot(node, _W + 1)),
        )
        known = [constant(slot.value) for slot in (*use.bias_steps, *(() if bias is None else (bias,)))]
        if use.found_integers() is None or any(tensor is None for tensor in known):
            raise DeclinedNode(weight.value, _OTHER_SCALES)
        return use

    def layer(self, node: ir.Node, weight: Slot, shape: tuple[int, ...], shapes: Shapes) -> WeightUse | None:
        """The layer on numbers; None where the node holds none."""
        raise NotImplementedError


@matches("QLinearConv")
@dataclass(frozen=True)
class CodedConvolution(CodedMatcher):
    """A convolution."""

    made: int = 6
    bias: int = 8

    def layer(self, node: ir.Node, weight: Slot, shape: tuple[int, ...], shapes: Shapes) -> WeightUse | None:
        kind = next(kind for kind in KINDS if kind.operator == "Conv")
        known = shapes.of(Slot(node, _X).value)
        size = (None,) * (len(shape) - 2) if known is None else known[2:]
        try:
            window = kind.window(node.attributes, shape, size)
        except UnsupportedError as error:
            raise DeclinedNode(weight.value, str(error)) from None
        return WeightUse(
            Slot(node, _X), weight, kind.name, window=window, integers=_steps(Steps, node, _W + 1)
        )


@matches("QLinearMatMul")
@dataclass(frozen=True)
class CodedProduct(CodedMatcher):
    """A product with a matrix on the right."""

    made: int = 6
    bias: int = 8

    def layer(self, node: ir.Node, weight: Slot, shape: tuple[int, ...], shapes: Shapes) -> WeightUse | None:
        if len(shape) != 2:
            raise DeclinedNode(weight.value, "it is no matrix")
        steps = _steps(Steps, node, _W + 1, axis=1)
        return WeightUse(Slot(node, _X), weight, PRODUCT, transposed=True, integers=steps)


@matches("com.microsoft::QGemm")
@dataclass(frozen=True)
class CodedGemm(CodedMatcher):
    """`alpha A' B' + C`."""

    made: int = 7
    bias: int = 6

    def layer(self, node: ir.Node, weight: Slot, shape: tuple[int, ...], shapes: Shapes) -> WeightUse | None:
        attributes = node.attributes
        turned = not bool(attributes.get_int("transB", 0))
        swap = (1, 0) if bool(attributes.get_int("transA", 0)) else None
        scale = attributes.get_float("alpha", 1.0)
        return WeightUse(
            Slot(node, _X), weight, PRODUCT, turned, scale, swap_in=swap, bias_scale=scale,
            integers=_steps(Steps, node, _W + 1, axis=int(turned)),
        )  # fmt: skip
