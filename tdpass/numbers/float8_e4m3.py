"""float8_e4m3: four bits of exponent and three of mantissa, with scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.numbers.base import SCALE, Part, Shape, register_numbers
from tdpass.numbers.scaled import Scaled


@register_numbers
@dataclass(frozen=True)
class Float8E4M3(Scaled):
    """The OCP format of 8 bits without infinities: 448 at most, 2^-9 at least, relative steps of 2^-3.

    Rounded to the nearest, halves to even (arXiv:2209.05433).
    """

    name = "float8_e4m3"
    bits = 8
    floating = True
    opset = 19

    @property
    def top(self) -> float:
        return torch.finfo(torch.float8_e4m3fn).max

    def stored(self, shape: Shape) -> Part:
        return Part(shape, torch.float8_e4m3fn)

    def nearest(self, steps: Tensor, zero: Tensor | float) -> Tensor:
        return self._values(steps).double()

    def codes(self, factor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        return self._values(self.by_row(factor) / beside[SCALE].double()[:, None]).reshape(factor.shape)

    def _values(self, steps: Tensor) -> Tensor:
        return steps.clamp(-self.top, self.top).to(torch.float8_e4m3fn)
