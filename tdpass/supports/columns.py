"""columns: whole columns."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.supports.base import Shape, register_support
from tdpass.supports.tiles import Tiles


@register_support
@dataclass(frozen=True)
class Columns(Tiles):
    """Whole columns."""

    name = "columns"
    example = "columns/30%"
    group = "column"

    def tile(self, shape: Shape) -> tuple[int, int]:
        return shape[0], 1
