"""levels: a codebook of few numbers, and for each value which of them it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.bits import pack_bits
from tdpass.numbers.base import VALUES, Numbers, Part, Shape, register_numbers
from tdpass.ops import StorageOps, V
from tdpass.packing.grids import find_multiples

TABLE = "levels"
MOST_LEVELS = 256
_ROUNDS = 200
_MOST_MULTIPLES = 127


@register_numbers
@dataclass(frozen=True)
class Levels(Numbers):
    """`table[values]`, the table in single precision, of `count` numbers.

    Where a factor has no more distinct numbers, the table is those; else it is found by Lloyd's algorithm
    from evenly spaced quantiles, zero among it where the factor holds zeros.
    """

    count: int
    name = "levels"
    opset = 11

    @classmethod
    def read(cls, options: Sequence[str]) -> Self:
        if len(options) != 1 or not options[0].isdecimal() or not 2 <= int(options[0]) <= MOST_LEVELS:
            raise ValueError(f"after levels stands their number, 2 to {MOST_LEVELS}, such as 'levels16'")
        return cls(int(options[0]))

    def __str__(self) -> str:
        return f"{self.name}{self.count}"

    @property
    def bits(self) -> int:
        """Those that tell `count` levels apart."""
        return (self.count - 1).bit_length()

    def parts(self, shape: Shape, kept: int | None = None) -> dict[str, Part]:
        values = math.prod(shape) if kept is None else kept
        return {
            VALUES: Part((math.ceil(values * self.bits / 8),), torch.uint8),
            TABLE: Part((self.count,), torch.float32),
        }

    def fit(self, factor: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        given = torch.ones_like(factor) if weights is None else weights
        numbers, places = torch.unique(factor.detach().double()[given > 0], return_inverse=True)
        counts = torch.zeros_like(numbers).index_add_(0, places, given[given > 0].double())
        if not numbers.numel():
            return {TABLE: torch.zeros(self.count)}
        table = numbers if numbers.numel() <= self.count else _lloyd(numbers, counts, self.count)
        return {TABLE: torch.cat([table, table[-1:].expand(self.count - table.numel())]).float()}

    def codes(self, factor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        table = beside[TABLE].double()
        return torch.bucketize(factor.detach().double().contiguous(), (table[1:] + table[:-1]) / 2)

    def multiples(self, table: Tensor) -> tuple[Tensor, Tensor] | None:
        """The levels as signed bytes times a step, bit for bit; None where they are no such.

        Evenly spaced levels are, and powers of two up to 64 times the least.
        """
        used = table.cpu()[table.cpu() != 0]
        bits = used.abs().numpy().view(np.uint32)
        grid = find_multiples(bits, table.dtype, np.zeros(1, np.int64)) if len(used) else None
        if grid is None or not grid.narrow or int(grid.indices.max()) >= _MOST_MULTIPLES:
            return None
        whole = torch.zeros_like(table, device="cpu")
        whole[table.cpu() != 0] = torch.from_numpy(grid.indices + 1).float() * used.sign()
        return whole.to(torch.int8), torch.from_numpy(grid.scales).float()

    def packed(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.bits)

    def unpacked(self, ops: StorageOps[V], values: V, count: int) -> V:
        return ops.unpack(values, count, self.bits)

    def decode(
        self, ops: StorageOps[V], codes: V, beside: Mapping[str, V], shape: Shape, dtype: torch.dtype
    ) -> V:
        return self._typed(ops, ops.reshape(ops.lookup(beside[TABLE], codes), shape), dtype)

    def store(
        self, factor: Tensor, kept: Tensor | None = None, beside: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        if kept is None:
            return super().store(factor, None, beside)
        return super().store(factor[kept], None, beside)

    def restore(
        self,
        ops: StorageOps[V],
        parts: Mapping[str, V],
        shape: Shape,
        dtype: torch.dtype,
        kept: V | None = None,
        count: int | None = None,
    ) -> V:
        if kept is None or count is None:
            return super().restore(ops, parts, shape, dtype)
        numbers = ops.lookup(
            parts[TABLE], self.unpacked(ops, parts[VALUES], count)
        )  # the first level is not zero
        return self._typed(ops, ops.spread(numbers, kept, shape), dtype)

    def _typed(self, ops: StorageOps[V], numbers: V, dtype: torch.dtype) -> V:
        return numbers if dtype is torch.float32 else ops.cast(numbers, dtype)


def _lloyd(numbers: Tensor, weights: Tensor, count: int) -> Tensor:
    """The `count` numbers of least squared distance to weighted ones, which are distinct and in order.

    Zero stays where it is one of them.
    """
    total, moment = (
        torch.cat([torch.zeros(1, dtype=torch.float64), part.cumsum(0)])
        for part in (weights, weights * numbers)
    )
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * numbers.numel()
    table, zero = numbers[places.long()], bool((numbers == 0).any())
    for _ in range(_ROUNDS):
        if zero:
            table[table.abs().argmin()] = 0.0
        table = table.sort().values
        edges = torch.cat(
            [
                torch.zeros(1, dtype=torch.long),
                torch.bucketize((table[1:] + table[:-1]) / 2, numbers),
                torch.tensor([numbers.numel()]),
            ]
        )
        held = total[edges[1:]] - total[edges[:-1]]
        means = torch.where(
            held > 0, (moment[edges[1:]] - moment[edges[:-1]]) / held.clamp_min(1e-300), table
        )
        if torch.equal(means, table):
            break
        table = means
    if zero:
        table[table.abs().argmin()] = 0.0
    return table.sort().values
