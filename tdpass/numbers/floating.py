"""Floating-point numbers, one by one."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.numbers.base import VALUES, Numbers, Part, Shape
from tdpass.ops import StorageOps, V


class Floating(Numbers, ABC):
    """Values as torch's `dtype` has them; nothing but the values is stored."""

    floating = True
    dtype: ClassVar[torch.dtype]

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        if options:
            raise ValueError(f"{cls.name} has no granularity; write {cls.name!r}")
        return cls()

    def __str__(self) -> str:
        return self.name

    def parts(self, shape: Shape, kept: int | None = None) -> dict[str, Part]:
        return {VALUES: Part(shape if kept is None else (kept,), self.dtype)}

    def fit(self, factor: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        return {}

    def codes(self, factor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        return factor.detach().to(self.dtype)

    def decode(
        self, ops: StorageOps[V], codes: V, beside: Mapping[str, V], shape: Shape, dtype: torch.dtype
    ) -> V:
        return codes if dtype is self.dtype else ops.cast(codes, dtype)
