"""Integers with scales by row: `values[r, k] scale[r]`, or `(values[r, k] - zero[r]) scale[r]`."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.numbers.base import SCALE, Part, Shape
from tdpass.numbers.scaled import GRAINS, ZERO, Scaled, grain_of, is_grain, positive


@dataclass(frozen=True)
class Integer(Scaled, ABC):
    """Signed integers of `bits` bits, rounded to the nearest, that share a scale by row.

    Symmetric: scale = max |w| / (2^(bits - 1) - 1).  With `zero` the range from the least to the largest
    number, 0 included, is covered from end to end.  Codes are of torch's `dtype`.
    """

    dtype: ClassVar[torch.dtype] = torch.int8
    zero: bool = False

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        zero = options[-1:] == ["zero"]
        grains = options[:-1] if zero else options
        if len(grains) > 1 or not all(is_grain(grain) or (zero and grain == "0") for grain in grains):
            raise ValueError(f"after {cls.name} stand {GRAINS}, then 'zero' for a zero point")
        return cls(grain_of(grains[0]) if grains else 0, zero)

    def __str__(self) -> str:
        return super().__str__() + "/zero" * self.zero

    def parts(self, shape: Shape, kept: int | None = None) -> dict[str, Part]:
        if kept is not None and self.zero:
            raise PlanError(
                f"{self} has a zero point, and entries that are not stored are zero; leave out '/zero' "
                "beside a support"
            )
        found = super().parts(shape, kept)
        return {**found, ZERO: Part(found[SCALE].shape, self.dtype)} if self.zero else found

    def stored(self, shape: Shape) -> Part:
        return Part(shape, self.dtype)

    def scales_rows(self, shape: Shape) -> bool:
        return self.stored(shape) == Part(shape, torch.int8) and self.group <= 0 and not self.zero

    @property
    def top(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def spanning(self, rows: Tensor, share: float) -> dict[str, Tensor]:
        if not self.zero:
            return super().spanning(rows, share)
        low, high = share * rows.amin(1).clamp(max=0), share * rows.amax(1).clamp(min=0)
        scale = positive((high - low) / (2 * self.top + 1))
        zero = (-self.top - 1 - low / scale).round().clamp(-self.top - 1, self.top)
        return {SCALE: scale, ZERO: zero.to(self.dtype)}

    def nearest(self, steps: Tensor, zero: Tensor | float) -> Tensor:
        return (steps.round() + zero).clamp(-self.top - self.zero, self.top) - zero

    def codes(self, factor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        zero = beside[ZERO].double()[:, None] if self.zero else 0.0
        steps = self.nearest(self.by_row(factor) / beside[SCALE].double()[:, None], zero)
        return (steps + zero).to(self.dtype).reshape(factor.shape)
