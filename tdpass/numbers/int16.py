"""int16: sixteen bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdpass.numbers.base import register_numbers
from tdpass.numbers.integer import Integer


@register_numbers
@dataclass(frozen=True)
class Int16(Integer):
    """Two bytes per value, as fixed-point machines compute with."""

    name = "int16"
    bits = 16
    dtype = torch.int16
