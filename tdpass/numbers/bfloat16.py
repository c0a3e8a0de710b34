"""bfloat16: single precision with 8 bits of mantissa."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdpass.numbers.base import register_numbers
from tdpass.numbers.floating import Floating


@register_numbers
@dataclass(frozen=True)
class BFloat16(Floating):
    """Single precision with 8 bits of mantissa."""

    name = "bfloat16"
    bits = 16
    dtype = torch.bfloat16
