"""uniform_levels: every weight that is not zero is a multiple of one interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.constraints.magnitudes import Magnitudes, on_levels, rank_within
from tdpass.errors import UsageError


@register_constraint
@dataclass(frozen=True)
class UniformLevels(Constraint):
    """Levels `+-q, +-2 q ... +-count q`.

    Zero is the pruned state, not a level: zeros stay, other weights never become zero (Ren et al. 2019).
    Without an `interval` the projection finds q by alternating between nearest levels and least squares.  A
    `fixed` share below one puts only that share of the weights nearest to each level on it and leaves the
    rest free, which needs an interval.
    """

    count: int
    interval: float | None = None
    fixed: float = 1.0
    name = "uniform_levels"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"count={self.count} levels on each side of zero are too few; give 1 or more")
        if self.interval is not None and not 0 < self.interval < math.inf:
            raise UsageError(
                f"interval={self.interval} between levels is not a positive number; leave it out to have it "
                "found"
            )
        if not 0 < self.fixed <= 1 or (self.fixed < 1 and self.interval is None):
            raise UsageError(
                f"fixed={self.fixed} with interval={self.interval} is not allowed; fix a share in (0, 1] of "
                "them, below 1 at a given interval"
            )

    @property
    def bits(self) -> int:
        """Bits that hold one surviving weight: its sign and its level."""
        return 1 + math.ceil(math.log2(self.count))

    def project(self, weight: Tensor) -> Tensor:
        wide = checked(weight)
        q = Magnitudes.of(wide).interval(self.count)[0] if self.interval is None else self.interval
        put = on_levels(weight, lambda magnitude: (magnitude / q).round_().clamp_(1, self.count) * q)
        return put if self.fixed == 1 else torch.where(self._settled(wide, put), put, weight.detach())

    def frozen(self, weight: Tensor) -> UniformLevels:
        if self.interval is not None:
            return self
        magnitudes = Magnitudes.of(checked(weight))
        return replace(self, interval=magnitudes.interval(self.count)[0]) if magnitudes.count else self

    def _settled(self, weight: Tensor, put: Tensor) -> Tensor:
        """Which weights are among the `fixed` share nearest to their level; the pruned ones are."""
        rank, size = rank_within(put, (weight - put).abs())
        return (put == 0) | (rank < (self.fixed * size).ceil())

    def __str__(self) -> str:
        apart = "" if self.interval is None else f" of {self.interval:.3g}"
        return f"{self.count} level{'' if self.count == 1 else 's'}{apart}"
