"""float32: single precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdpass.numbers.base import register_numbers
from tdpass.numbers.floating import Floating


@register_numbers
@dataclass(frozen=True)
class Float32(Floating):
    """Single precision."""

    name = "float32"
    bits = 32
    dtype = torch.float32
