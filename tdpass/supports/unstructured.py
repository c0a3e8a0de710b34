"""unstructured: single entries."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.supports.base import Shape, register_support
from tdpass.supports.tiles import Tiles


@register_support
@dataclass(frozen=True)
class Unstructured(Tiles):
    """Single entries."""

    name = "unstructured"
    example = "unstructured/500"

    def tile(self, shape: Shape) -> tuple[int, int]:
        return 1, 1
