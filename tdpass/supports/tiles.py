"""What keeps so many tiles of one size."""

from __future__ import annotations

import re
from abc import ABC
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.supports.base import PERCENT, Shape, Support, amount_of, largest, matrix_of

AMOUNT = r"/([1-9]\d*|\d+(?:\.\d+)?%)"


@dataclass(frozen=True)
class Tiles(Support, ABC):
    """As many tiles as `amount` says: a number, or a share such as `30%` of those there are, one at least."""

    amount: str

    @classmethod
    def read(cls, text: str) -> Self | None:
        match = re.fullmatch(cls.name + AMOUNT, text)
        return None if match is None else cls(match[1])

    def __str__(self) -> str:
        return f"{self.name}/{self.amount}"

    @property
    def share(self) -> float | None:
        return float(self.amount[:-1]) / PERCENT if self.amount.endswith("%") else None

    def tiles(self, shape: Shape) -> int:
        whole = self.bits(shape)
        found = amount_of(self.amount, whole)
        if found > whole:
            raise PlanError(
                f"support '{self}' keeps {found} of the {whole} that a factor of shape {shape} has; keep "
                "fewer"
            )
        return found

    def choose(self, scores: Tensor) -> Tensor:
        shape = tuple(scores.shape)
        (rows, columns), (high, wide) = matrix_of(shape), self.tile(shape)
        parts = scores.reshape(rows // high, high, columns // wide, wide)
        kept = largest(parts.sum((1, 3), keepdim=True), self.tiles(shape))
        return kept.expand(parts.shape).reshape(shape)
