"""float16: half precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdpass.numbers.base import register_numbers
from tdpass.numbers.floating import Floating


@register_numbers
@dataclass(frozen=True)
class Float16(Floating):
    """Half precision."""

    name = "float16"
    bits = 16
    dtype = torch.float16
