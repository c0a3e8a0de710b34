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
from tdpass.numbers.base import VALUES, Numbers, Part, Shape
from tdpass.ops import StorageOps, V

_SCALE, _ZERO = "scale", "zero"
_ALLOWED = "a granularity ('tensor', or the size of a group such as '64'; none for one scale per channel), then 'zero' for a zero point"


@dataclass(frozen=True)
class Integer(Numbers, ABC):
    """Signed integers of `bits` bits, rounded to the nearest, that share a scale by row.

    A row is what one index of the factor's first axis holds (`group` 0), a group of that many numbers of it, or all of the factor
    (`group` -1).  Symmetric: scale = max |w| / (2^(bits - 1) - 1).  With `zero` the range from the least to the largest number, 0
    included, is covered from end to end.
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
            raise PlanError(f"{self} does not divide a factor of shape {shape}: a channel holds {math.prod(shape) // shape[0]} numbers; choose another group")
        return math.prod(shape) // self.group

    def parts(self, shape: Shape, kept: int | None = None) -> dict[str, Part]:
        if kept is not None and self.zero:
            raise PlanError(f"{self} has a zero point, and entries that are not stored are zero; leave out '/zero' beside a support")
        rows = (self.rows(shape),)
        found = {VALUES: self.stored(shape if kept is None else (kept,)), _SCALE: Part(rows, torch.float32)}
        return {**found, _ZERO: Part(rows, torch.int8)} if self.zero else found

    def stored(self, shape: Shape) -> Part:
        """The values alone."""
        return Part(shape, torch.int8)

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1)) - 1

    def fit(self, factor: Tensor) -> dict[str, Tensor]:
        rows = self._by_row(factor)
        if not self.zero:
            return {_SCALE: _positive(rows.abs().amax(1) / self.top)}
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        scale = _positive((high - low) / (2 * self.top + 1))
        zero = (-self.top - 1 - low / scale).round().clamp(-self.top - 1, self.top)
        return {_SCALE: scale, _ZERO: zero.to(torch.int8)}

    def codes(self, factor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        steps = (self._by_row(factor) / beside[_SCALE].double()[:, None]).round()
        shifted = steps + beside[_ZERO].double()[:, None] if self.zero else steps
        return shifted.clamp(-self.top - self.zero, self.top).to(torch.int8).reshape(factor.shape)

    def decode(self, ops: StorageOps[V], codes: V, beside: Mapping[str, V], shape: Shape, dtype: torch.dtype) -> V:
        return ops.dequantize(codes, beside[_SCALE], beside.get(_ZERO), shape, self.rows(shape), dtype)

    def _by_row(self, factor: Tensor) -> Tensor:
        return factor.detach().double().reshape(self.rows(tuple(factor.shape)), -1)


def _positive(scale: Tensor) -> Tensor:
    """The scale as it is stored; one where all numbers of a row are zero, or too small to be told from it."""
    single = scale.float()
    return torch.where(single > 0, single, torch.ones_like(single))
