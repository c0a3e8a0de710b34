"""blocks: tiles of several rows and columns."""

from __future__ import annotations

import re
from dataclasses import dataclass

from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.supports.base import Shape, matrix_of, register_support
from tdpass.supports.tiles import AMOUNT, Tiles


@register_support
@dataclass(frozen=True)
class Blocks(Tiles):
    """Tiles of `high` rows and `wide` columns."""

    high: int
    wide: int
    name = "blocks"
    example = "blocks4x4/12"
    group = "block"

    @classmethod
    def read(cls, text: str) -> Self | None:
        match = re.fullmatch(rf"{cls.name}([1-9]\d*)x([1-9]\d*)" + AMOUNT, text)
        return None if match is None else cls(match[3], int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.name}{self.high}x{self.wide}/{self.amount}"

    def tile(self, shape: Shape) -> tuple[int, int]:
        rows, columns = matrix_of(shape)
        if rows % self.high or columns % self.wide:
            raise PlanError(
                f"support '{self}' does not divide a factor of shape {shape}, a matrix of {rows} x "
                f"{columns}; choose other blocks"
            )
        return self.high, self.wide
