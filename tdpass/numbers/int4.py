"""int4: four bits, two values to a byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.bits import pack_bits
from tdpass.numbers.base import Earlier, Part, Shape, register_numbers
from tdpass.numbers.integer import Integer
from tdpass.numbers.scaled import ZERO
from tdpass.ops import StorageOps, V


@register_numbers
@dataclass(frozen=True)
class Int4(Integer):
    """Two values to a byte, the first in its lower half, as ONNX stores them; zero points likewise."""

    name = "int4"
    bits = 4
    opset = 11

    def stored(self, shape: Shape) -> Part:
        return Part(((math.prod(shape) + 1) // 2,), torch.uint8)

    def parts(self, shape: Shape, kept: int | None = None) -> dict[str, Part]:
        found = super().parts(shape, kept)
        return {**found, ZERO: self.stored((self.rows(shape),))} if self.zero else found

    def packed_beside(self, beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.packed(part) if name == ZERO else part for name, part in beside.items()}

    def unpacked_beside(self, ops: StorageOps[V], beside: Mapping[str, V], shape: Shape) -> Mapping[str, V]:
        if not self.zero:
            return beside
        return {**beside, ZERO: self.unpacked(ops, beside[ZERO], self.rows(shape))}

    def earlier(self, shape: Shape) -> dict[str, Earlier]:
        whole = Part((self.rows(shape),), self.dtype)
        return {ZERO: Earlier(whole, self.packed)} if self.zero else {}

    def packed(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.bits)

    def unpacked(self, ops: StorageOps[V], values: V, count: int) -> V:
        return ops.unpack(values, count, self.bits, signed=True)
