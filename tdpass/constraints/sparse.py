"""sparse: few weights, or groups of weights, are not zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.constraints.order_statistics import nth_largest
from tdpass.constraints.support import Support, masked
from tdpass.errors import UsageError

Group = Literal["weight", "row", "column", "filter", "channel", "kernel", "block"]


@register_constraint
@dataclass(frozen=True)
class Sparse(Constraint):
    """At most `keep` groups are not zero.

    The projection keeps those of largest Frobenius norm, which is exact as groups do not overlap. With a
    `metric` m of the weight's shape, not negative, the nearest is meant in the norm sum m w^2.

    Groups of `W[o, i, *kernel]`: `weight` a single one; `row` and `column` of the `o x (i h w)` matrix;
    `filter` an output channel, the same as `row`; `channel` an input channel; `kernel` the taps of one (o,
    i); `block` a tile of that matrix, ragged at the edges. Of groups with equal norm the first are kept.
    """

    keep: int
    group: Group = "weight"
    block: tuple[int, int] = (1, 16)
    metric: Tensor | None = field(default=None, compare=False, repr=False)
    name = "sparse"

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UsageError(
                f"keep={self.keep} of a sparse weight is below 1; a layer with no weight left passes "
                "nothing on, remove it instead"
            )
        if self.group not in get_args(Group):
            raise UsageError(
                f"unknown group {self.group!r} of a sparse weight; known: {', '.join(get_args(Group))}"
            )
        if min(self.block) < 1:
            raise UsageError(
                f"block={self.block} of a sparse weight has a side below 1; give (rows, columns) such as "
                "(1, 16)"
            )

    def project(self, weight: Tensor) -> Tensor:
        return masked(weight, self.mask(weight))

    def mask(self, weight: Tensor) -> Tensor:
        """Which weights the projection keeps, as booleans of the weight's shape."""
        energy = checked(weight).square()
        if self.metric is not None:
            energy = energy * self.metric.to(energy)
        if self.group == "block":
            return self._blocks(energy.flatten(1)).reshape(weight.shape)
        view = energy.flatten(1) if self.group == "column" else energy
        axes = tuple(range(view.dim()))
        shared = {
            "weight": (),
            "row": axes[1:],
            "filter": axes[1:],
            "column": (0,),
            "channel": (0, *axes[2:]),
            "kernel": axes[2:],
        }[self.group]
        norms = view.sum(shared, keepdim=True) if shared else view
        return largest(norms, self.keep).expand(view.shape).reshape(weight.shape)

    def frozen(self, weight: Tensor) -> Support:
        return Support(self.mask(weight))

    def _blocks(self, matrix: Tensor) -> Tensor:
        (rows, columns), (o, d) = self.block, matrix.shape
        high, wide = math.ceil(o / rows), math.ceil(d / columns)
        tiles = F.pad(matrix, (0, wide * columns - d, 0, high * rows - o)).reshape(high, rows, wide, columns)
        kept = largest(tiles.sum((1, 3), keepdim=True), self.keep).expand(tiles.shape)
        return kept.reshape(high * rows, wide * columns)[:o, :d]

    def __str__(self) -> str:
        noun = f"{self.block[0]}x{self.block[1]} block" if self.group == "block" else self.group
        return f"{self.keep:,} {noun}{'' if self.keep == 1 else 's'}"


def largest(values: Tensor, count: int) -> Tensor:
    """Booleans of the `count` largest values; of equal ones the first."""
    flat = values.reshape(-1)
    if count >= len(flat):
        return torch.ones_like(values, dtype=torch.bool)
    edge = nth_largest(flat, count)
    kept = flat >= edge
    if int(kept.count_nonzero()) == count:
        return kept.reshape(values.shape)
    above, level = flat > edge, flat == edge
    return (above | (level & (level.cumsum(0) <= count - above.count_nonzero()))).reshape(values.shape)
