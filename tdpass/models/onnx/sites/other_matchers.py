"""Matchers of operators that say a layer in another way: fused with what follows, or as an Einsum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.kinds import KINDS, PRODUCT, Contraction, moves
from tdpass.models.onnx.graph.functions import FUNCTIONS, Operator
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import sizes
from tdpass.models.onnx.operators.ops import OnnxOps
from tdpass.models.onnx.sites.matchers import (
    DeclinedNode,
    GemmMatcher,
    WindowMatcher,
    held_weight,
    matches,
    operands_of,
)
from tdpass.models.onnx.sites.weight_use import Slot, WeightUse

_FOLLOWING: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "LeakyRelu": ("alpha",),
    "Elu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "Clip": ("min", "max"),
    "HardSigmoid": ("alpha", "beta"),
}
"""Activations that a layer may be fused with, and the numbers that each takes, in order."""


@dataclass(frozen=True)
class Activation:
    """The activation that an operator computes after its layer, as an operator with float attributes."""

    operator: str
    attributes: tuple[tuple[str, float], ...] = ()

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return ()

    def on(self, twins: Mapping[ir.Node, ir.Node]) -> Activation:
        return self

    def written(self, ops: OnnxOps, y: ir.Value) -> ir.Value:
        return ops.activated(y, self.operator, dict(self.attributes))

    def computed(self, y: Tensor, values: Mapping[ir.Value, Tensor]) -> Tensor:
        attributes = {name: ir.AttrFloat32(name, number) for name, number in self.attributes}
        made = FUNCTIONS.get(self.operator)(Operator(self.operator, 0, attributes), y)
        assert isinstance(made, Tensor)
        return made


def _following(weight: ir.Value, name: str, given: Mapping[str, float]) -> Activation | None:
    if name in ("", "Identity"):
        return None
    if name not in _FOLLOWING:
        raise DeclinedNode(weight, f"it is fused with {name}, which cannot be written apart from it")
    return Activation(name, tuple(given.items()))


@matches("com.microsoft::FusedConv")
class FusedConvMatcher:
    """`activation(conv(x) + bias + z)`."""

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        kind = next(kind for kind in KINDS if kind.operator == "Conv")
        use = WindowMatcher(kind).match(node, shapes)
        if use is None:
            return None
        name = node.attributes.get_string("activation", "")
        numbers = node.attributes.get_floats("activation_params", ())
        named = dict(zip(_FOLLOWING.get(name, ()), numbers, strict=False))
        if len(named) < len(_FOLLOWING.get(name, ())):
            raise DeclinedNode(use.weight.value, f"it is fused with {name}, of which numbers are missing")
        added = Slot(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else None
        return replace(use, addend=added, following=_following(use.weight.value, name, named))


@matches("com.microsoft::FusedGemm")
class FusedGemmMatcher:
    """`activation(Gemm)`."""

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        use = GemmMatcher().match(node, shapes)
        if use is None:
            return None
        name = node.attributes.get_string("activation", "")
        given = {
            label: node.attributes.get_float(f"activation_{label}", 0.0)
            for label in _FOLLOWING.get(name, ())
            if f"activation_{label}" in node.attributes
        }
        return replace(use, following=_following(use.weight.value, name, given))


@matches("com.microsoft::FusedMatMul", "com.microsoft::TransposeMatMul")
class FusedMatMulMatcher:
    """`alpha A' B'` with a constant matrix on either side, the last two axes of either exchanged before."""

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        operands = operands_of(node)
        if operands is None:
            return None
        tensor, weight, data = operands
        flips = [bool(node.attributes.get_int(f"trans{name}", 0)) for name in "AB"]
        if len(sizes(tensor)) != 2 or bool(node.attributes.get_int(f"transBatch{'AB'[data.index]}", 0)):
            raise DeclinedNode(weight.value, "its operands are exchanged along axes of samples")
        right, rank, swap = weight.index == 1, shapes.rank(data.value), None
        transposed, swapped = flips[weight.index] is not right, flips[data.index] is right
        if swapped or not right:
            if rank is None or rank < 2:
                raise DeclinedNode(weight.value, "its other operand is transposed and its rank is unknown")
            swap = (*range(rank - 2), rank - 1, rank - 2)
        return WeightUse(
            data, weight, PRODUCT, transposed, node.attributes.get_float("alpha", 1.0),
            swap_in=swap if swapped else None, swap_out=None if right else swap,
        )  # fmt: skip


@matches("Einsum")
class EinsumMatcher:
    """A sum over indices that data and a constant share: a linear layer between permutations."""

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        if len(node.inputs) != 2:
            return self._several(node)
        operands = operands_of(node)
        if operands is None:
            return None
        tensor, weight, data = operands
        equation, rank = node.attributes["equation"].as_string(), shapes.rank(data.value)
        try:
            found = Contraction.of(equation, weight.index, rank)
        except UnsupportedError as error:
            raise DeclinedNode(weight.value, str(error)) from None
        use = WeightUse(data, weight, PRODUCT, swap_in=moves(found.inward), swap_out=moves(found.outward))
        if found.plain:
            return replace(use, transposed=found.summed == (0,))
        if rank is None or len(sizes(tensor)) != len(found.made) + len(found.summed):
            raise DeclinedNode(weight.value, "the rank of the data is unknown; run shape inference first")
        return replace(use, contraction=found)

    @staticmethod
    def _several(node: ir.Node) -> None:
        for place in range(len(node.inputs)):
            if held_weight(node, place) is not None:
                raise DeclinedNode(Slot(node, place).value, "it is one of several operands of an Einsum")
