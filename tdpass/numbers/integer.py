"""Integers with scales: `values[r, k] scale[r]`, or `(values[r, k] - zero[r]) scale[r]`, over rows of a factor."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.numbers.base import SCALE, VALUES, Numbers, Part, Shape
from tdpass.ops import StorageOps, V

_ZERO = "zero"
_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)  # of the range of a row, what is beyond being cut
_ALLOWED = "a granularity ('tensor', or the size of a group such as '64'; none for one scale per channel), then 'zero' for a zero point"


@dataclass(frozen=True)
class Integer(Numbers, ABC):
    """Signed integers of `bits` bits, rounded to the nearest, that share a scale by row.

    A row is what one index of the factor's first axis holds (`group` 0), a group of that many numbers of it,
    or all of the factor (`group` -1).  Symmetric: scale = max |w| / (2^(bits - 1) - 1).  With `zero` the
    range from the least to the largest number, 0 included, is covered from end to end.
    """

    group: int = 0
    zero: bool = False

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        rest = list(options)
        zero = bool(rest) and rest[-1] == "zero" and rest.pop() == "zero"
        grain = rest.pop(0) if rest else "0"
        if rest or not (grain == "tensor" or grain.isdecimal()) or (options and grain == "0" and not zero):
            raise ValueError(f"after {cls.name} stand {_ALLOWED}")
        return cls(-1 if grain == "tensor" else int(grain), zero)

    def __str__(self) -> str:
        grain = {0: "", -1: "/tensor"}.get(self.group, f"/{self.group}")
        return f"{self.name}{grain}{'/zero' if self.zero else ''}"

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
        if kept is not None and self.zero:
            raise PlanError(
                f"{self} has a zero point, and entries that are not stored are zero; leave out '/zero' "
                "beside a support"
            )
        rows = (self.rows(shape),)
        found = {VALUES: self.stored(shape if kept is None else (kept,)), SCALE: Part(rows, torch.float32)}
        return {**found, _ZERO: Part(rows, torch.int8)} if self.zero else found

    def stored(self, shape: Shape) -> Part:
        """The values alone."""
        return Part(shape, torch.int8)

    def scales_rows(self, shape: Shape) -> bool:
        return self.stored(shape) == Part(shape, torch.int8) and self.group <= 0 and not self.zero

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1)) - 1

    def fit(self, factor: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        rows = self._by_row(factor)
        whole = self._range(rows, 1.0)
        if weights is None:
            return whole
        counts = self._by_row(weights)
        best, least = whole, self._error(rows, whole, counts)
        for share in _SHARES:
            tried = self._range(rows, share)
            error = self._error(rows, tried, counts)
            best = {name: torch.where(error < least, tried[name], best[name]) for name in best}
            least = torch.minimum(error, least)
        return best

    def _error(self, rows: Tensor, beside: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """Weighed squared error of each row."""
        scale = beside[SCALE].double()[:, None]
        zero = beside[_ZERO].double()[:, None] if self.zero else 0.0
        steps = ((rows / scale).round() + zero).clamp(-self.top - self.zero, self.top) - zero
        return (weights * (steps * scale - rows).square()).sum(1)

    def _range(self, rows: Tensor, share: float) -> dict[str, Tensor]:
        """Scales and zero points that cover so much of the range of each row."""
        if not self.zero:
            return {SCALE: _positive(share * rows.abs().amax(1) / self.top)}
        low, high = share * rows.amin(1).clamp(max=0), share * rows.amax(1).clamp(min=0)
        scale = _positive((high - low) / (2 * self.top + 1))
        zero = (-self.top - 1 - low / scale).round().clamp(-self.top - 1, self.top)
        return {SCALE: scale, _ZERO: zero.to(torch.int8)}

    def codes(self, factor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        steps = (self._by_row(factor) / beside[SCALE].double()[:, None]).round()
        shifted = steps + beside[_ZERO].double()[:, None] if self.zero else steps
        return shifted.clamp(-self.top - self.zero, self.top).to(torch.int8).reshape(factor.shape)

    def decode(
        self, ops: StorageOps[V], codes: V, beside: Mapping[str, V], shape: Shape, dtype: torch.dtype
    ) -> V:
        return ops.dequantize(codes, beside[SCALE], beside.get(_ZERO), shape, self.rows(shape), dtype)

    def column(
        self, numbers: Tensor, beside: Mapping[str, Tensor], shape: Shape, place: int, rows: slice
    ) -> Tensor:
        scale, zero = (self._along(beside.get(name), shape, place, rows) for name in (SCALE, _ZERO))
        return (((numbers / scale).round() + zero).clamp(-self.top - self.zero, self.top) - zero) * scale

    def _along(self, part: Tensor | None, shape: Shape, place: int, rows: slice) -> Tensor:
        """Scales or zero points of one column at these rows; zero where there are none."""
        if part is None:
            return torch.zeros((), dtype=torch.float64)
        grid = part.double().reshape(1 if self.group < 0 else shape[0], -1)
        return grid[:, 0] if self.group < 0 else grid[rows, place // self.group if self.group else 0]

    def _by_row(self, factor: Tensor) -> Tensor:
        return factor.detach().double().reshape(self.rows(tuple(factor.shape)), -1)


def _positive(scale: Tensor) -> Tensor:
    """The scale as it is stored; one where all numbers of a row are zero, or too small to be told from it."""
    single = scale.float()
    return torch.where(single > 0, single, torch.ones_like(single))
