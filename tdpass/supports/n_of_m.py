"""n_of_m: of every M entries of a row that follow each other, N."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.supports.base import Shape, Support, matrix_of, register_support


@register_support
@dataclass(frozen=True)
class NOfM(Support):
    """`2:4` keeps two of every four."""

    keep: int
    of: int
    name = "n_of_m"
    example = "2:4"

    @classmethod
    def read(cls, text: str) -> Self | None:
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
        if match is None:
            return None
        keep, of = int(match[1]), int(match[2])
        if keep >= of:
            raise PlanError(
                f"support {text!r} keeps everything; keep fewer of every {of}, or leave the support out"
            )
        return cls(keep, of)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def tile(self, shape: Shape) -> tuple[int, int]:
        if matrix_of(shape)[1] % self.of:
            raise PlanError(
                f"support '{self}' does not divide a factor of shape {shape}, whose rows hold "
                f"{matrix_of(shape)[1]} numbers; choose another"
            )
        return 1, 1

    def tiles(self, shape: Shape) -> int:
        rows, columns = matrix_of(shape)
        return rows * columns // self.of * self.keep

    def choose(self, scores: Tensor) -> Tensor:
        parts = scores.reshape(-1, self.of)
        order = torch.sort(parts, dim=1, descending=True, stable=True).indices[:, : self.keep]
        return (
            torch.zeros(parts.shape, dtype=torch.bool, device=scores.device)
            .scatter_(1, order, value=True)
            .reshape(scores.shape)
        )
