"""int8: eight bits."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.numbers.base import register_numbers
from tdpass.numbers.integer import Integer


@register_numbers
@dataclass(frozen=True)
class Int8(Integer):
    """A byte per value."""

    name = "int8"
    bits = 8
