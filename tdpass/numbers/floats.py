"""float64, float32, float16, bfloat16: floating-point numbers, one by one."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.numbers.base import VALUES, Numbers, Part, Shape, register_numbers
from tdpass.ops import Ops, V


class _Float(Numbers, ABC):
    dtype: ClassVar[torch.dtype]

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        if options:
            raise ValueError(f"{cls.name} has no granularity; write {cls.name!r}")
        return cls()

    def __str__(self) -> str:
        return self.name

    def parts(self, shape: Shape) -> dict[str, Part]:
        return {VALUES: Part(shape, self.dtype)}

    def store(self, factor: Tensor) -> dict[str, Tensor]:
        return {VALUES: factor.to(self.dtype).contiguous()}

    def restore(self, ops: Ops[V], parts: Mapping[str, V], shape: Shape, dtype: torch.dtype) -> V:
        return parts[VALUES] if dtype is self.dtype else ops.cast(parts[VALUES], dtype)


@register_numbers
@dataclass(frozen=True)
class Float64(_Float):
    """Double precision."""

    name = "float64"
    bits = 64
    dtype = torch.float64


@register_numbers
@dataclass(frozen=True)
class Float32(_Float):
    """Single precision."""

    name = "float32"
    bits = 32
    dtype = torch.float32


@register_numbers
@dataclass(frozen=True)
class Float16(_Float):
    """Half precision."""

    name = "float16"
    bits = 16
    dtype = torch.float16


@register_numbers
@dataclass(frozen=True)
class BFloat16(_Float):
    """Single precision with 8 bits of mantissa."""

    name = "bfloat16"
    bits = 16
    dtype = torch.bfloat16
