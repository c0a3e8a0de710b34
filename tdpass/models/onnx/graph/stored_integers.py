"""Whole numbers in a graph: constants that DequantizeLinear turns into numbers, and values on byte grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx.graph.tensors import constant, sizes, to_torch


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
    """A weight of int8: the constant of the codes, the codes as the layer reads them, and each one's scale.

    `scales`, and `zeros`, what codes are counted from, where there are such, are of the size of `codes`.
    """

    source: ir.Value
    scale_source: ir.Value
    codes: Tensor
    scales: Tensor
    zero_source: ir.Value | None = None
    zeros: Tensor | None = None

    def laid_out(self, how: Callable[[Tensor], Tensor]) -> Integers:
        """The same numbers in another shape or order."""
        zeros = None if self.zeros is None else how(self.zeros)
        return replace(self, codes=how(self.codes), scales=how(self.scales), zeros=zeros)

    def scale_along(self, axis: int) -> Tensor | None:
        """The scale of every slice along an axis; None where it differs within one."""
        rows = self.scales.movedim(axis, 0).flatten(1)
        return rows[:, 0].contiguous() if bool((rows == rows[:, :1]).all()) else None


def integers_of(weight: ir.Value | None) -> Integers | None:
    """The int8 constant that a weight is made of; None for all else, and where it has zero points.

    The weight is made by DequantizeLinear and nodes that lay it out anew.
    """
    found = shifted_integers_of(weight)
    return None if found is None or found.zeros is not None else found


def shifted_integers_of(weight: ir.Value | None) -> Integers | None:
    """The same as `integers_of`, zero points included."""
    node = None if weight is None else weight.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "DequantizeLinear":
        return _dequantized(node)
    if node.op_type not in ("Transpose", "Reshape"):
        return None
    inner = shifted_integers_of(node.inputs[0])
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


def _dequantized(node: ir.Node) -> Integers | None:
    source, scale = node.inputs[0], node.inputs[1]
    held, scales = constant(source), constant(scale)
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if source is None or scale is None or held is None or scales is None:
        return None
    if held.dtype != ir.DataType.INT8 or scales.dtype != ir.DataType.FLOAT or len(sizes(scales)) > 1:
        return None
    if node.attributes.get_int("block_size", 0) or (len(node.inputs) > 2 and zero is None):
        return None
    codes, steps = to_torch(held), to_torch(scales)
    along = [1] * codes.dim()
    if steps.numel() > 1:
        along[node.attributes.get_int("axis", 1)] = -1
    found = Integers(source, scale, codes, torch.broadcast_to(steps.reshape(along), codes.shape))
    points = torch.zeros(1) if zero is None else to_torch(zero)
    if not bool(points.any()):
        return found
    spread = torch.broadcast_to(points.reshape(along), codes.shape)
    return replace(found, zero_source=node.inputs[2], zeros=spread)
