"""Whole numbers in Triton: what a stage of an int8 chain reads, what its products stand for, what it leaves.

Bytes are moved by 128 to be multiplied as int8: `sum (code - zero) w = sum (code - 128) w + shift` with
`shift = 128 sum w - zero total`.  Floating-point numbers are float32, rounded after every operation, as in
the references of `int8_chain`; launches are made without contraction to fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tdpass.kernels.gpu.language import activated, activation_of, finish, jit, single
from tdpass.kernels.gpu.matrix import Matrix
from tdpass.kernels.gpu.weights import kept, spaced
from tdpass.kernels.grid import MIDDLE, Grid
from tdpass.kernels.stage import Stage

LEAST_DEPTH = 32  # of a tile of bytes that tensor cores multiply
BYTES, ON_GRID, BY_ROW = 0, 1, 2  # how x is read: as codes, put on a grid, every row on one of its own
NO_GRID = Grid()
_LEAST = tl.constexpr(1e-30)  # the range of a row that is all zeros
_WHOLE = tl.constexpr(
    12582912.0
)  # 1.5 x 2^23: added and taken away, it leaves a number rounded, halves to even


@jit
def rounded(steps: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """`clamp(round(steps) + zero, 0, 255)` as floating-point numbers, NaN to 0."""
    steps = tl.where(steps > -zero, steps, -zero)
    steps = tl.where(steps < 255.0 - zero, steps, 255.0 - zero)
    return (steps + _WHOLE) - _WHOLE + zero


@jit
def shifted(steps: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """The codes of numbers given in steps of their grid, less 128."""
    return (rounded(steps, zero) - 128.0).to(tl.int8)


@jit
def read(
    place: tl.tensor, seen: tl.tensor, inverse: tl.tensor, zero: tl.tensor, reads: tl.constexpr
) -> tl.tensor:
    """The codes of what lies at `place`, less 128; `inverse` is of the scale, one number or one per row."""
    found = tl.load(place, mask=seen, other=0)
    if reads == 0:
        return (found ^ 128).to(tl.int8, bitcast=True)
    return shifted(found.to(tl.float32) * inverse, zero)


@jit
def largest(values: tl.tensor) -> tl.tensor:
    """The largest size in each row, NaN where one of its numbers is."""
    sizes = tl.abs(values)
    known = sizes == sizes  # noqa: PLR0124 - all but NaN
    most = tl.maximum(tl.max(tl.where(known, sizes, 0.0), 1), _LEAST)
    return tl.where(tl.min(known.to(tl.int32), 1) > 0, most, float("nan"))


@jit
def reach(
    lines: tl.tensor, inside: tl.tensor, depth: tl.tensor, column: tl.tensor, block_m: tl.constexpr,
    block_k: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The largest size in each line of x."""
    found = tl.full((block_m,), _LEAST, tl.float32)
    for start in range(0, depth, block_k):
        k = start + tl.arange(0, block_k)
        seen = inside[:, None] & (k[None, :] < depth)
        values = tl.load(lines[:, None] + k[None, :] * column, mask=seen, other=0.0)
        more = largest(values.to(tl.float32))
        found = tl.where((more > found) | (more != more), more, found)  # noqa: PLR0124 - NaN stays
    return found


@jit
def worth(
    products: tl.tensor, scale: tl.tensor, shift: tl.tensor, n: tl.tensor, there: tl.tensor, level: tl.tensor
) -> tl.tensor:
    """`(products + shift[n]) (level scale[n])`, float32."""
    whole = products + tl.load(shift + n, mask=there, other=0)[None, :]
    return whole.to(tl.float32) * (level * tl.load(scale + n, mask=there, other=0.0))[None, :]


@jit
def leave(
    total: tl.tensor, bias: tl.tensor, rest: tl.tensor, n: tl.tensor, there: tl.tensor, mask: tl.tensor,
    rest_scale: tl.tensor, rest_zero: tl.tensor, y_inverse: tl.tensor, y_zero: tl.tensor,
    activation: tl.constexpr, biased: tl.constexpr, rested: tl.constexpr, rest_codes: tl.constexpr,
    codes: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`activation(total + bias[n] + rest)`, as codes where it has a grid."""
    if rest_codes:
        total = finish(total, bias, rest, n, there, mask, 0, biased, False)
        total += (tl.load(rest, mask=mask, other=0).to(tl.float32) - rest_zero) * rest_scale
        total = activated(total, activation)
    else:
        total = finish(total, bias, rest, n, there, mask, activation, biased, rested)
    if codes:
        total = rounded(total * y_inverse, y_zero)
    return total


@dataclass(frozen=True)
class Factor:
    """A stage: int8 `rows[o, ..]`, float32 `scale[o]`, and int32 `shift[o]` for the grid that it reads."""

    rows: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, stage: Stage, weight: Tensor, scale: Tensor, total: Tensor, grid: Grid) -> Factor:
        """A pointwise stage from what `int8_factor` packs."""
        rows = kept(
            [weight],
            (stage, "bytes"),
            lambda: spaced(stage.unpack(weight, "quads").flatten(1), torch.int8),
        )
        return cls.laid(rows, weight, scale, total, grid)

    @classmethod
    def laid(cls, rows: Tensor, weight: Tensor, scale: Tensor, total: Tensor, grid: Grid) -> Factor:
        """With its whole numbers `rows[o, ..]` as kernels read them, kept with the packed weight."""
        zero = int(zero_of(grid))

        def make() -> Tensor:
            return MIDDLE * rows.flatten(1).sum(1, dtype=torch.int32) - zero * total.int()

        return cls(rows, scale.float().contiguous(), kept([weight, total], ("shift", zero), make))


@dataclass(frozen=True)
class Ending:
    """What becomes of products: bias, residual and activation, then codes where `output` is a grid.

    `inverse` is of the scale of the output, where the level of the products does not hold it already.
    """

    bias: Tensor | None = None
    rest: Matrix | None = None
    rest_grid: Grid = NO_GRID
    activation: str = "identity"
    output: Grid = NO_GRID
    inverse: float = 1.0

    def arguments(self, y: Matrix) -> dict[str, Any]:
        """The arguments of `leave`, as the kernels name them."""
        return {
            "bias": self.bias,
            "rest": y.data if self.rest is None else self.rest.data,
            "rest_scale": single(self.rest_grid.scale),
            "rest_zero": float(self.rest_grid.zero),
            "y_inverse": self.inverse,
            "y_zero": float(self.output.zero),
            "activation": activation_of(self.activation),
            "biased": self.bias is not None,
            "rested": self.rest is not None,
            "rest_codes": bool(self.rest_grid) and self.rest is not None,
            "codes": bool(self.output),
        }


def inverse_of(grid: Grid) -> float:
    """One over the scale, float32; 1 where there is no grid."""
    return single(1 / single(grid.scale)) if grid else 1.0


def zero_of(grid: Grid) -> float:
    """The zero point; that of rows with grids of their own where there is no grid."""
    return float(grid.zero if grid else MIDDLE)


def way_of(x: Tensor, grid: Grid) -> int:
    """How a stage reads x."""
    if x.dtype == torch.uint8:
        return BYTES
    return ON_GRID if grid else BY_ROW


def level_of(read: Grid, into: Grid) -> tuple[float, float]:
    """What a product is worth beside the scale of its factor, and the `inverse` of what the next stage reads.

    Where both grids are known beforehand one number holds both scales.
    """
    if not read:
        return 1.0, inverse_of(into)
    if into:
        return single(single(read.scale) * inverse_of(into)), 1.0
    return single(read.scale), 1.0


def steps_of(reads: Sequence[Grid]) -> list[tuple[float, float]]:
    """`level_of` of every stage of a chain, the last of which goes to no grid of another."""
    return [level_of(read, into) for read, into in zip(reads, [*reads[1:], NO_GRID], strict=True)]
