"""Values that share a scale by row: `values[r, k] scale[r]`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.numbers.base import SCALE, VALUES, Numbers, Part, Shape
from tdpass.ops import StorageOps, V

ZERO = "zero"
_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)  # of the range of a row, what is beyond being cut
GRAINS = "a granularity ('tensor', or the size of a group such as '64'; none for one scale per channel)"


@dataclass(frozen=True)
class Scaled(Numbers, ABC):
    """Values rounded to the nearest in steps of a scale that they share by row.

    A row is what one index of the factor's first axis holds (`group` 0), a group of that many numbers of it,
    or all of the factor (`group` -1).  Symmetric: scale = max |w| / top.
    """

    group: int = 0

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        if len(options) > 1 or not all(map(is_grain, options)):
            raise ValueError(f"after {cls.name} stands {GRAINS}")
        return cls(grain_of(options[0])) if options else cls()

    def __str__(self) -> str:
        return self.name + {0: "", -1: "/tensor"}.get(self.group, f"/{self.group}")

    @property
    @abstractmethod
    def top(self) -> float:
        """The largest value."""

    @abstractmethod
    def stored(self, shape: Shape) -> Part:
        """The values alone."""

    @abstractmethod
    def nearest(self, steps: Tensor, zero: Tensor | float) -> Tensor:
        """Of numbers in steps of their scales the nearest that values less `zero` stand for, float64."""

    def rows(self, shape: Shape) -> int:
        """How many scales a factor of that shape has."""
        if self.group <= 0:
            return 1 if self.group else shape[0]
        if (math.prod(shape) // shape[0]) % self.group:
            raise PlanError(
                f"{self} does not divide a factor of shape {shape}: a channel holds "
                f"{math.prod(shape) // shape[0]} numbers; choose another group"
            )
        return math.prod(shape) // self.group

    def parts(self, shape: Shape, kept: int | None = None) -> dict[str, Part]:
        rows = (self.rows(shape),)
        return {VALUES: self.stored(shape if kept is None else (kept,)), SCALE: Part(rows, torch.float32)}

    def fit(self, factor: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        rows = self.by_row(factor)
        whole = self.spanning(rows, 1.0)
        if weights is None:
            return whole
        counts = self.by_row(weights)
        best, least = whole, self._error(rows, whole, counts)
        for share in _SHARES:
            tried = self.spanning(rows, share)
            error = self._error(rows, tried, counts)
            best = {name: torch.where(error < least, tried[name], best[name]) for name in best}
            least = torch.minimum(error, least)
        return best

    def spanning(self, rows: Tensor, share: float) -> dict[str, Tensor]:
        """What stands beside the values where they span so much of the range of each row."""
        return {SCALE: positive(share * rows.abs().amax(1) / self.top)}

    def _error(self, rows: Tensor, beside: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """Weighed squared error of each row."""
        scale = beside[SCALE].double()[:, None]
        zero = beside[ZERO].double()[:, None] if ZERO in beside else 0.0
        return (weights * (self.nearest(rows / scale, zero) * scale - rows).square()).sum(1)

    def decode(
        self, ops: StorageOps[V], codes: V, beside: Mapping[str, V], shape: Shape, dtype: torch.dtype
    ) -> V:
        return ops.dequantize(codes, beside[SCALE], beside.get(ZERO), shape, self.rows(shape), dtype)

    def beside_lines(
        self, ops: StorageOps[V], beside: Mapping[str, V], shape: Shape, axis: int, places: V
    ) -> Mapping[str, V] | None:
        if self.group < 0 or axis == 1:
            return beside if self.group <= 0 else None
        by_row = (shape[0], self.rows(shape) // shape[0])
        return {
            name: ops.reshape(ops.take(ops.reshape(part, by_row), places, -2), (-1,))
            for name, part in beside.items()
        }

    def column(
        self, numbers: Tensor, beside: Mapping[str, Tensor], shape: Shape, place: int, rows: slice
    ) -> Tensor:
        scale, zero = (self._along(beside.get(name), shape, place, rows) for name in (SCALE, ZERO))
        return self.nearest(numbers / scale, zero) * scale

    def _along(self, part: Tensor | None, shape: Shape, place: int, rows: slice) -> Tensor:
        """Scales or zero points of one column at these rows; zero where there are none."""
        if part is None:
            return torch.zeros((), dtype=torch.float64)
        grid = part.double().reshape(1 if self.group < 0 else shape[0], -1)
        return grid[:, 0] if self.group < 0 else grid[rows, place // self.group if self.group else 0]

    def by_row(self, factor: Tensor) -> Tensor:
        """The numbers that share a scale, float64, row by row."""
        return factor.detach().double().reshape(self.rows(tuple(factor.shape)), -1)


def is_grain(text: str) -> bool:
    """Whether this names a granularity other than the one of no name."""
    return text == "tensor" or (text.isdecimal() and text != "0")


def grain_of(text: str) -> int:
    """`group` as a text names it."""
    return -1 if text == "tensor" else int(text)


def positive(scale: Tensor) -> Tensor:
    """The scale as it is stored; one where all numbers of a row are zero, or too small to be told from it."""
    single = scale.float()
    return torch.where(single > 0, single, torch.ones_like(single))
