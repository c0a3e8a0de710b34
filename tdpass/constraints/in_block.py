"""in_block: rows or columns within the blocks of a matrix, of which few are not zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.constraints.sparse import largest
from tdpass.constraints.support import Support, masked
from tdpass.errors import UsageError

Side = Literal["row", "column"]


@register_constraint
@dataclass(frozen=True)
class InBlock(Constraint):
    """Of all rows, or columns, of the blocks of the `o x (i h w)` matrix at most `keep` are not zero.

    After Yuan et al., ISLPED 2019. `block` is (rows, columns), ragged at the edges; a `column` of a block is
    one word line of the array that holds it, a `row` one bit line.  The projection keeps those of largest
    norm, which is exact as they do not overlap; of equal ones the first.
    """

    keep: int
    side: Side = "column"
    block: tuple[int, int] = (32, 32)
    name = "in_block"

    def __post_init__(self) -> None:
        if self.keep < 1 or min(self.block) < 1:
            raise UsageError(
                f"keep={self.keep}, block={self.block} of groups in blocks: give 1 or more, and blocks of "
                "at least one row and column"
            )
        if self.side not in get_args(Side):
            raise UsageError(f"unknown side {self.side!r} of a block; known: {', '.join(get_args(Side))}")

    def project(self, weight: Tensor) -> Tensor:
        return masked(weight, self.mask(weight))

    def mask(self, weight: Tensor) -> Tensor:
        """Which weights the projection keeps, as booleans of the weight's shape."""
        kept = largest(self.energies(checked(weight).square()), self.keep)
        return self._spread(kept, weight.flatten(1)).reshape(weight.shape)

    def energies(self, values: Tensor) -> Tensor:
        """The sum of the values in each group.

        `[blocks down, columns]`, or for rows `[rows, blocks across]`.
        """
        matrix = values.flatten(1)
        rows, columns = matrix.shape
        if self.side == "column":
            high = math.ceil(rows / self.block[0])
            return (
                F.pad(matrix, (0, 0, 0, high * self.block[0] - rows))
                .reshape(high, self.block[0], columns)
                .sum(1)
            )
        wide = math.ceil(columns / self.block[1])
        return F.pad(matrix, (0, wide * self.block[1] - columns)).reshape(rows, wide, self.block[1]).sum(2)

    def frozen(self, weight: Tensor) -> Support:
        return Support(self.mask(weight))

    def _spread(self, groups: Tensor, matrix: Tensor) -> Tensor:
        """A value of each group for every weight in it."""
        axis = 0 if self.side == "column" else 1
        return groups.repeat_interleave(self.block[axis], axis)[: matrix.shape[0], : matrix.shape[1]]

    def __str__(self) -> str:
        return (
            f"{self.keep:,} {self.side}{'' if self.keep == 1 else 's'} of "
            f"{self.block[0]}x{self.block[1]} blocks"
        )
