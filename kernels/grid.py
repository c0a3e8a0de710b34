"""Grids of unsigned bytes in which int8 chains keep activations: `value = (code - zero) scale`.

Codes are 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.errors import KernelError

TOP = 255
MIDDLE = 128  # the zero point of rows that choose their scale themselves: codes 1 to 255
_LEAST = 1e-30  # the range of a row that is all zeros


@dataclass(frozen=True)
class Grid:
    """A scale and a zero point; a scale of 0 is no grid.

    Where a stage reads no grid, every row (position) is put on one of its own: `scale = max |x| / 127`, zero
    point 128; a row with NaN has scale NaN, and so is all that is made of it.  An output or a residual
    without one is floating point.
    """

    scale: float = 0.0
    zero: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.scale < math.inf and 0 <= self.zero <= TOP and self.zero == int(self.zero)):
            raise KernelError(
                f"{self} is no grid; its scale is positive, or 0 for none, and its zero point 0 to {TOP}"
            )

    def __bool__(self) -> bool:
        return self.scale > 0

    @property
    def step(self) -> Tensor:
        """The scale in float32."""
        return torch.tensor(self.scale, dtype=torch.float32)

    def codes(self, x: Tensor) -> Tensor:
        """`x`, float32, in steps of the grid: `clamp(round(x / scale) + zero)`, halves to even, NaN to 0."""
        return rounded(x * (1 / self.step), self.zero)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32."""
        return (codes.float() - self.zero) * self.step


def rounded(steps: Tensor, zero: int) -> Tensor:
    """Codes of numbers given in steps of the grid, float32, as floating-point numbers."""
    low, high = torch.tensor(float(-zero)), torch.tensor(float(TOP - zero))
    steps = torch.where(steps > low, steps, low)
    return torch.where(steps < high, steps, high).round() + zero


def own_grid(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, one per index of the other axes, of numbers that are put on grids of their own.

    The scale is NaN where one of the numbers is.
    """
    largest = x.abs().amax(axis, keepdim=True).clamp_min(_LEAST)
    return rounded(x * (127 / largest), MIDDLE), largest / 127


@dataclass(frozen=True)
class Grids:
    """The grids of a chain: what every stage reads, the output and the residual.

    In an operator they are a list of pairs (scale, zero).
    """

    reads: tuple[Grid, ...]
    output: Grid = Grid()
    residual: Grid = Grid()

    def numbers(self) -> list[float]:
        """The grids as an operator takes them; `read` reads them."""
        return [float(number) for grid in self for number in (grid.scale, grid.zero)]

    def __iter__(self) -> Iterator[Grid]:
        yield from (*self.reads, self.output, self.residual)

    @classmethod
    def read(cls, numbers: Sequence[float], stages: int) -> Grids:
        """The grids of a chain of so many stages; raises `KernelError` for a list that is none."""
        if len(numbers) != 2 * (stages + 2) or not all(map(math.isfinite, numbers)):
            raise KernelError(
                f"{list(numbers)} are no grids of a chain of {stages} stages; give a scale and a zero point "
                "for what each stage reads, for the output and for the residual"
            )
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        found = [Grid(scale, int(zero) if float(zero).is_integer() else -1) for scale, zero in pairs]
        return cls(tuple(found[:stages]), *found[stages:])

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """The type of the output: bytes where it has a grid, else that of x, float32 where x is bytes."""
        if self.output:
            return torch.uint8
        return x.dtype if x.is_floating_point() else torch.float32

    def check(self, x: Tensor, residual: Tensor | None) -> None:
        """Raise `KernelError` unless x and the residual have the types that their grids say."""
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise KernelError(f"x of type {x.dtype} is not served; it is floating point, or uint8 on a grid")
        if x.dtype == torch.uint8 and not self.reads[0]:
            raise KernelError("x is uint8 without a grid; give the scale that its codes have")
        if residual is not None and (residual.dtype == torch.uint8) != bool(self.residual):
            raise KernelError(
                f"the residual of type {residual.dtype} and {self.residual} do not fit; uint8 has a grid, "
                "floating point has none"
            )
        if residual is not None and residual.dtype != torch.uint8 and not residual.is_floating_point():
            raise KernelError(f"a residual of type {residual.dtype} is not served")
