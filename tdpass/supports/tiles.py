"""What keeps so many tiles of one size."""

from __future__ import annotations

import re
from abc import ABC
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.supports.base import Shape, Support, amount_of, largest

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
        (rows, columns), (high, wide) = scores.shape, self.tile((scores.shape[0], scores.shape[1]))
        parts = scores.reshape(rows // high, high, columns // wide, wide)
        kept = largest(parts.sum((1, 3), keepdim=True), self.tiles((rows, columns)))
        return kept.expand(parts.shape).reshape(rows, columns)
