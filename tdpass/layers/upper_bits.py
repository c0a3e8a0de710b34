"""Integers whose upper bits are integers of fewer bits: one set of weights at several precisions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.numbers import numbers_named
from tdpass.numbers.base import Numbers

_TYPES = ("int4", "int8", "int16")
MOST_BITS = 16
LEAST_BITS = 2


def type_of(bits: int) -> Numbers:
    """The smallest number type of integers that has so many bits."""
    return next(numbers for numbers in map(numbers_named, _TYPES) if numbers.bits >= bits)


@dataclass(frozen=True)
class Codes:
    """A factor as integers `values[r, ...] scale[r]` of `bits` bits, or a part of one."""

    values: Tensor
    scale: Tensor
    bits: int

    @classmethod
    def of(cls, factor: Tensor, most: int, least: int) -> Self:
        """Codes of `most` bits in the range of those of the `least` bits, so that none is cut off there."""
        top = int(2 ** (least - 1) - 1) << (most - least)
        rows = factor.detach().double().flatten(1)
        scale = (rows.abs().amax(1) / top).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        values = (rows / scale.double()[:, None]).round().clamp(-top, top).reshape(factor.shape)
        return cls(values.to(torch.int8 if most <= type_of(8).bits else torch.int16), scale, most)

    def narrow(self, axis: int, first: int, count: int) -> Self:
        """Some of its rows or columns, as views."""
        scale = self.scale if axis else self.scale.narrow(0, first, count)
        return type(self)(self.values.narrow(axis, first, count), scale, self.bits)

    def upper(self, bits: int) -> Self:
        """Its upper bits, the next rounded into them: value = scale 2^d round(code / 2^d), d bits fewer."""
        dropped = self.bits - bits
        if not dropped:
            return self
        values = (self.values.to(torch.int32) + (1 << (dropped - 1))) >> dropped
        return type(self)(values, self.scale * 2.0**dropped, bits)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The numbers that they stand for."""
        return self.values.to(dtype) * self.scale.to(dtype).reshape(-1, *(1,) * (self.values.dim() - 1))

    def stored(self, name: str) -> dict[str, Tensor]:
        """The same as the parts of `type_of` its bits, for a factor of that name."""
        numbers = type_of(self.bits)
        whole = torch.int16 if numbers.bits == MOST_BITS else torch.int8
        return {name: numbers.packed(self.values.to(whole)), scale_of(name): self.scale.clone()}


def scale_of(name: str) -> str:
    """The name of the scales of a factor."""
    return f"{name}_scale"
