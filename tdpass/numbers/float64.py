"""float64: double precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdpass.numbers.base import register_numbers
from tdpass.numbers.floating import Floating


@register_numbers
@dataclass(frozen=True)
class Float64(Floating):
    """Double precision."""

    name = "float64"
    bits = 64
    dtype = torch.float64
