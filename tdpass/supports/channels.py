"""channels: whole input channels, every tap of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tdpass.supports.base import Shape, register_support
from tdpass.supports.tiles import Tiles


@register_support
@dataclass(frozen=True)
class Channels(Tiles):
    """Whole input channels; in a linear layer its columns."""

    name = "channels"
    example = "channels/50%"
    group = "channel"

    def tile(self, shape: Shape) -> tuple[int, int]:
        return shape[0], math.prod(shape[2:])
