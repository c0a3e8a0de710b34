"""The operators of the domain com.tdpass whose weights are whole numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import Self

from tdpass.fusing.spec import ChainSpec
from tdpass.models.onnx.operators.fused import bounds, conv_attributes, ending, layer, title

_BYTE_STEP = 1 / 127
# on the same grids only numbers in the middle of two codes may become the other one
_MIDDLES = _BYTE_STEP / 4
_AXES_AS_INPUT = 18
_TO_FLOAT = f"Cast <to: int = {int(ir.DataType.FLOAT)}>"


@dataclass(frozen=True)
class Int8ChainOp:
    """`y = activation(layers(x) + bias + residual)` on integers.

    What every layer reads is on a grid of bytes and its weight of int8. Inputs are x, of bytes; per layer the
    scale and zero point of what it reads, its weight and the scales of that, one per output channel; the
    bias; then the residual and the bounds of a clamp where there are such.  With `coded` y is of bytes, on
    the grid that the last two inputs are.
    """

    linear: bool
    stages: int
    residual: bool
    activation: str
    coded: bool
    grain: ClassVar[float] = _MIDDLES

    @classmethod
    def of(cls, spec: ChainSpec, *, coded: bool) -> Self:
        """The operator of a chain."""
        return cls(spec.linear, len(spec.stages), spec.residual, spec.activation, coded)

    @property
    def name(self) -> str:
        kind = "Linear" if self.linear else "Conv"
        rest = f"{'Add' * self.residual}{title(self.activation)}{'Bytes' * self.coded}"
        return f"Int8{kind}Chain{self.stages}{rest}"

    @property
    def inputs(self) -> list[str]:
        each = [(f"x{k}_scale", f"x{k}_zero", f"w{k}", f"w{k}_scale") for k in range(1, self.stages + 1)]
        named = ["x", *(name for names in each for name in names), "bias", *["residual"] * self.residual]
        named += bounds(self.activation)
        return [*named, *(["y_scale", "y_zero"] if self.coded else [])]

    @property
    def outputs(self) -> list[str]:
        return ["y"]

    @property
    def attributes(self) -> list[str]:
        return [] if self.linear else conv_attributes(self.stages)

    def body(self, opset: int) -> str:
        del opset
        lines = []
        for k in range(1, self.stages + 1):
            grid = f"x{k}_scale, x{k}_zero"
            if k > 1:
                lines.append(f"c{k} = QuantizeLinear (h{k - 1}, {grid})")
            lines.append(f"a{k} = DequantizeLinear ({'x' if k == 1 else f'c{k}'}, {grid})")
            lines.append(f"m{k} = DequantizeLinear <axis: int = {int(self.linear)}> (w{k}, w{k}_scale)")
            shift = ", bias" if not self.linear and k == self.stages else ""
            lines.append(f"h{k} = {layer(self.linear, k)} (a{k}, m{k}{shift})")
        added = ["bias"] * self.linear + ["residual"] * self.residual
        lines += ending(f"h{self.stages}", added, self.activation, "numbers" if self.coded else "y")
        if self.coded:
            lines.append("y = QuantizeLinear (numbers, y_scale, y_zero)")
        return "\n".join(lines)


@dataclass(frozen=True)
class _FindsGrids:
    """What operators on int8 weights share that put what these read on grids found in every call.

    Inputs are x, of numbers; per layer its weight and the scales of that; the bias; then the residual and the
    bounds of a clamp where there are such.
    """

    stages: int
    residual: bool
    activation: str
    kind: ClassVar[str]

    @classmethod
    def of(cls, spec: ChainSpec) -> Self:
        """The operator of a chain."""
        return cls(len(spec.stages), spec.residual, spec.activation)

    @property
    def name(self) -> str:
        return f"DynamicInt8{self.kind}Chain{self.stages}{'Add' * self.residual}{title(self.activation)}"

    @property
    def inputs(self) -> list[str]:
        each = [name for k in range(1, self.stages + 1) for name in (f"w{k}", f"w{k}_scale")]
        return ["x", *each, "bias", *["residual"] * self.residual, *bounds(self.activation)]

    @property
    def outputs(self) -> list[str]:
        return ["y"]


@dataclass(frozen=True)
class DynamicChainOp(_FindsGrids):
    """`y = activation(products(x) + bias + residual)` with matrices of int8, each row on a grid of its own.

    What every matrix `[i, o]` reads is rounded, row by row, to 127 steps of its largest number.
    """

    kind: ClassVar[str] = "Linear"

    @property
    def grain(self) -> float:
        return rounded_anew(self.stages)

    @property
    def attributes(self) -> list[str]:
        return []

    def body(self, opset: int) -> str:
        lines, last = list[str](), "x"
        for k in range(1, self.stages + 1):
            lines.append(f"matrix_w{k} = {_TO_FLOAT} (w{k})")
            lines += product_by_row(f"w{k}", last, f"h{k}", opset)
            last = f"h{k}"
        added = ["bias", *["residual"] * self.residual]
        return "\n".join([*lines, *ending(last, added, self.activation)])


@dataclass(frozen=True)
class DynamicConvChainOp(_FindsGrids):
    """`y = activation(convolutions(x) + bias + residual)` with int8 weights, what each reads put on one grid.

    That grid is found as DynamicQuantizeLinear finds it.  Scales, one per output, and the bias have axes of
    one behind.
    """

    kind: ClassVar[str] = "Conv"
    grain: ClassVar[float] = _MIDDLES

    @property
    def attributes(self) -> list[str]:
        return conv_attributes(self.stages)

    def body(self, opset: int) -> str:
        del opset
        lines, last = list[str](), "x"
        for k in range(1, self.stages + 1):
            integer = layer(False, k).replace("Conv", "ConvInteger", 1)
            lines.append(f"c{k}, step{k}, zero{k} = DynamicQuantizeLinear ({last})")
            lines.append(f"whole{k} = {integer} (c{k}, w{k}, zero{k})  sums{k} = {_TO_FLOAT} (whole{k})")
            lines.append(f"unit{k} = Mul (step{k}, w{k}_scale)  h{k} = Mul (sums{k}, unit{k})")
            last = f"h{k}"
        added = ["bias", *["residual"] * self.residual]
        return "\n".join([*lines, *ending(last, added, self.activation)])


def rounded_anew(products: int) -> float:
    """What it comes to that what so many products read is rounded on other grids of bytes than before."""
    return _BYTE_STEP * math.sqrt(2 * products)


def product_by_row(weight: str, read: str, made: str, opset: int) -> Iterator[str]:
    """The product with `matrix_WEIGHT`, whole numbers with the scales `WEIGHT_scale`, of rows that are rounded.

    Each row is rounded to 127 steps of its largest number.
    """
    axes = "axes: ints = [-1], " if opset < _AXES_AS_INPUT else ""
    last = f", axis_{weight}" if opset >= _AXES_AS_INPUT else ""
    for name, number in (("axis", -1), ("first", 0), ("second", 1)):
        yield f"{name}_{weight} = Constant <value_ints: ints = [{number}]> ()"
    yield f"top_{weight} = Constant <value: tensor = float {{127.0}}> ()"
    yield f"least_{weight} = Constant <value: tensor = float {{1e-30}}> ()"
    yield f"size_{weight} = Abs ({read})"
    yield f"ranges_{weight} = ReduceMax <{axes}keepdims: int = 1> (size_{weight}{last})"
    # of no rows ONNX Runtime's reductions leave every column
    yield f"range_{weight} = Slice (ranges_{weight}, first_{weight}, second_{weight}, axis_{weight})"
    yield f"largest_{weight} = Max (range_{weight}, least_{weight})"
    yield f"finer_{weight} = Div (top_{weight}, largest_{weight})"
    yield f"steps_{weight} = Mul ({read}, finer_{weight})  codes_{weight} = Round (steps_{weight})"
    yield f"sums_{weight} = MatMul (codes_{weight}, matrix_{weight})"
    yield f"step_{weight} = Div (largest_{weight}, top_{weight})"
    yield (
        f"unit_{weight} = Mul ({weight}_scale, step_{weight})  {made} = Mul (sums_{weight}, unit_{weight})"
    )


@dataclass(frozen=True)
class WeightOnlyOp:
    """`y = activation(Q x + U V x + bias + residual)` with a matrix Q of 4 or 8 bits on the last axis of x.

    Inputs are x, the codes of Q and their scales, `[o groups]`; with `zeros` what codes are counted from;
    with `low_rank` V `[r, i]` and U `[o, r]` of float16; then bias, residual and the bounds of a clamp where
    there are such.  Codes and zero points of 4 bits lie as MatMulNBits has them, those of 8 bits are int8,
    `[o groups, i / groups]` and `[o groups]`.
    """

    bits: int
    zeros: bool
    low_rank: bool
    bias: bool
    residual: bool
    activation: str
    grain: ClassVar[float] = 0.0

    @property
    def name(self) -> str:
        rest = f"{'Zeros' * self.zeros}{'LowRank' * self.low_rank}{'Bias' * self.bias}{'Add' * self.residual}"
        return f"WeightOnlyLinear{self.bits}{rest}{title(self.activation)}"

    @property
    def inputs(self) -> list[str]:
        thin, added = ["v", "u"] * self.low_rank, ["bias"] * self.bias + ["residual"] * self.residual
        return ["x", *self._matrix, *thin, *added, *bounds(self.activation)]

    @property
    def _matrix(self) -> list[str]:
        return ["codes", "scale", *["zeros"] * self.zeros]

    @property
    def outputs(self) -> list[str]:
        return ["y"]

    @property
    def attributes(self) -> list[str]:
        """Inputs, outputs, and how many inputs share a scale, named as MatMulNBits has them."""
        return ["K", "N", "block_size"]

    def body(self, opset: int) -> str:
        del opset
        stored = ", ".join(self._matrix)
        nibbles = "K: int = @K, N: int = @N, bits: int = 4, block_size: int = @block_size"
        lines = [
            f"h_untyped = com.microsoft.MatMulNBits <{nibbles}> (x, {stored})",
            f"h = {_TO_FLOAT} (h_untyped)",  # inference of types knows no operators of com.microsoft
        ]
        if self.bits != 4:
            lines = [
                "rest = Constant <value_ints: ints = [-1]> ()",
                "wide = Constant <value_int: int = @K> ()",
                "width = Reshape (wide, rest)",
                "shape = Concat <axis: int = 0> (rest, width)",
                f"numbers = DequantizeLinear <axis: int = 0> ({stored})",
                "rows = Reshape (numbers, shape)",
                "columns = Transpose <perm: ints = [1, 0]> (rows)",
                "h = MatMul (x, columns)",
            ]
        added = ["bias"] * self.bias + ["residual"] * self.residual
        if self.low_rank:
            for factor, read in (("v", "x"), ("u", "product_v")):
                lines.append(f"wide_{factor} = {_TO_FLOAT} ({factor})")
                lines.append(f"turned_{factor} = Transpose <perm: ints = [1, 0]> (wide_{factor})")
                lines.append(f"product_{factor} = MatMul ({read}, turned_{factor})")
            added = ["product_u", *added]
        return "\n".join([*lines, *ending("h", added, self.activation)])
