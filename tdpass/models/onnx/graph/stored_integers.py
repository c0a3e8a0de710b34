"""Whole numbers in a graph: constants that DequantizeLinear turns into numbers, and values on byte grids."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx.graph.tensors import constant, sizes, to_torch

_BYTES = frozenset({ir.DataType.INT8})
NUMBERS: Mapping[ir.DataType, str] = {
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.INT16: "int16",
    ir.DataType.INT4: "int4",
    ir.DataType.UINT4: "int4",
}
"""The number type of weights that a graph stores as these; unsigned ones are counted from their middle."""
_MIDDLES = {ir.DataType.UINT8: 128, ir.DataType.UINT4: 8}
_NUMBERED = frozenset({*NUMBERS, ir.DataType.INT32})


@dataclass(frozen=True)
class Grid:
    """A value on a grid of bytes: where the codes are, and the constants that scale and zero point are."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value

    @classmethod
    def of(cls, node: ir.Node | None, operator: str) -> Grid | None:
        """What a QuantizeLinear makes, or a DequantizeLinear reads, with one scale; None for all else."""
        if node is None or node.domain or node.op_type != operator or len(node.inputs) != 3:
            return None
        value, scale, zero = node.inputs
        codes = value if operator == "DequantizeLinear" else node.outputs[0]
        held, zeros = constant(scale), constant(zero)
        if codes is None or scale is None or zero is None or held is None or zeros is None:
            return None
        fits = held.size == 1 and zeros.dtype == ir.DataType.UINT8 and held.dtype == ir.DataType.FLOAT
        return cls(codes, scale, zero) if fits else None


@dataclass(frozen=True)
class Integers:
    """A weight of integers: the constant of the codes, the codes as the layer reads them, each one's scale.

    `scales`, and `zeros`, what codes are counted from, where there are such, are of the size of `codes`.
    Unsigned codes have their middle taken off, and so have their zeros.
    """

    source: ir.Value
    scale_source: ir.Value
    codes: Tensor
    scales: Tensor
    zero_source: ir.Value | None = None
    zeros: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the weight as the layer reads it."""
        return tuple(self.codes.shape)

    def numbers(self) -> Tensor:
        """The numbers that the integers stand for."""
        codes = self.codes.to(self.scales.dtype)
        return (codes if self.zeros is None else codes - self.zeros.to(codes.dtype)) * self.scales

    def laid_out(self, how: Callable[[Tensor], Tensor]) -> Integers:
        """The same numbers in another shape or order."""
        zeros = None if self.zeros is None else how(self.zeros)
        return replace(self, codes=how(self.codes), scales=how(self.scales), zeros=zeros)

    def scale_along(self, axis: int) -> Tensor | None:
        """The scale of every slice along an axis; None where it differs within one."""
        return one_along(self.scales, axis)


def one_along(spread: Tensor, axis: int) -> Tensor | None:
    """The number that every slice along an axis has, which may be none; None where it differs within one."""
    rows = spread.movedim(axis, 0).flatten(1)
    alike = (rows == rows[:, :1]) | rows.isnan()
    return rows[:, 0].contiguous() if bool(alike.all()) else None


def integers_of(weight: ir.Value | None) -> Integers | None:
    """The int8 constant that a weight is made of; None for all else, and where it has zero points.

    The weight is made by DequantizeLinear and nodes that lay it out anew.
    """
    found = shifted_integers_of(weight)
    return None if found is None or found.zeros is not None else found


def numbered(weight: ir.Value | None) -> Integers | None:
    """The integers of any type that a weight, or a bias, is made of; None for all else."""
    return shifted_integers_of(weight, _NUMBERED)


def shifted_integers_of(weight: ir.Value | None, kinds: Container[ir.DataType] = _BYTES) -> Integers | None:
    """The same as `integers_of`, zero points included, of these types."""
    node = None if weight is None else weight.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "DequantizeLinear":
        return _dequantized(node, kinds)
    if node.op_type not in ("Transpose", "Reshape"):
        return None
    inner = shifted_integers_of(node.inputs[0], kinds)
    if inner is None:
        return None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", tuple(reversed(range(inner.codes.dim()))))
        return inner.laid_out(lambda part: part.permute(*order))
    wanted = constant(node.inputs[1])
    if wanted is None:
        return None
    shape: Sequence[int] = to_torch(wanted).tolist()
    return inner.laid_out(lambda part: part.reshape(*shape))


def _dequantized(node: ir.Node, kinds: Container[ir.DataType]) -> Integers | None:
    if node.attributes.get_int("block_size", 0):
        return None
    return with_scales([*node.inputs, None][:3], node.attributes.get_int("axis", 1), kinds)


def with_scales(
    given: Sequence[ir.Value | None], axis: int, kinds: Container[ir.DataType] = _NUMBERED
) -> Integers | None:
    """Constant integers with their scale and zero point, or one of each for every slice along an axis.

    None for all else.
    """
    source, scale, zero_source = given
    held, scales, zero = constant(source), constant(scale), constant(zero_source)
    if source is None or scale is None or held is None or scales is None:
        return None
    if held.dtype not in kinds or scales.dtype != ir.DataType.FLOAT or len(sizes(scales)) > 1:
        return None
    if zero_source is not None and zero is None:
        return None
    middle = _MIDDLES.get(held.dtype, 0)
    codes, steps = to_torch(held), to_torch(scales)
    codes = codes if not middle else (codes.to(torch.int16) - middle).to(torch.int8)
    along = [1] * codes.dim()
    if steps.numel() > 1:
        along[axis] = -1
    found = Integers(source, scale, codes, torch.broadcast_to(steps.reshape(along), codes.shape))
    points = (torch.zeros(1) if zero is None else to_torch(zero)).to(torch.int32) - middle
    points = points.to(codes.dtype)
    if not bool(points.any()):
        return found
    spread = torch.broadcast_to(points.reshape(along), codes.shape)
    return replace(found, zero_source=zero_source, zeros=spread)
