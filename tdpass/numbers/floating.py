"""Floating-point numbers, one by one."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.numbers.base import VALUES, Numbers, Part, Shape
from tdpass.ops import Ops, V


class Floating(Numbers, ABC):
    """Values as torch's `dtype` has them; nothing but the values is stored."""

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
