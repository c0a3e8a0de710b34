"""rows: whole rows."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.supports.base import Shape, matrix_of, register_support
from tdpass.supports.tiles import Tiles


@register_support
@dataclass(frozen=True)
class Rows(Tiles):
    """Whole rows."""

    name = "rows"
    example = "rows/8"
    group = "row"

    def tile(self, shape: Shape) -> tuple[int, int]:
        return 1, matrix_of(shape)[1]
