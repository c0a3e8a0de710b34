"""int4: four bits, two values to a byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.numbers.base import Part, Shape, register_numbers
from tdpass.numbers.integer import Integer
from tdpass.ops import StorageOps, V, pack_bits


@register_numbers
@dataclass(frozen=True)
class Int4(Integer):
    """Two values to a byte, the first in its lower half, as ONNX stores them."""

    name = "int4"
    bits = 4

    def stored(self, shape: Shape) -> Part:
        return Part(((math.prod(shape) + 1) // 2,), torch.uint8)

    def packed(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.bits)

    def unpacked(self, ops: StorageOps[V], values: V, count: int) -> V:
        return ops.unpack(values, count, self.bits, signed=True)
