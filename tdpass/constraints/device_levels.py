"""device_levels: every weight that is not zero is what a device can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.constraints.magnitudes import Levels, Magnitudes, on_levels
from tdpass.errors import UsageError


@register_constraint
@dataclass(frozen=True)
class DeviceLevels(Constraint):
    """Levels `+-scale m` for the magnitudes m of a device's states.

    Such are the means of measured conductances (Yuan et al., ISLPED 2019). The least of them is not zero: no
    state is a zero, a pruned weight is absent instead, so zeros stay and other weights never become zero, and
    what lies outside the device's range goes to its ends.  Without a `scale` the projection finds that of
    least squared error.
    """

    magnitudes: tuple[float, ...]
    scale: float | None = None
    name = "device_levels"

    def __post_init__(self) -> None:
        rising = all(0 < a < b < math.inf for a, b in zip(self.magnitudes, self.magnitudes[1:], strict=False))
        if len(self.magnitudes) < 2 or not rising:
            raise UsageError(
                f"magnitudes {self.magnitudes[:4]} of a device are not two or more rising positive numbers; "
                "zero is no state"
            )
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise UsageError(
                f"scale={self.scale} of levels is not a positive number; leave it out to have it found"
            )

    @property
    def levels(self) -> Levels:
        """The magnitudes as levels."""
        return Levels(torch.tensor(self.magnitudes, dtype=torch.float64))

    def project(self, weight: Tensor) -> Tensor:
        wide, levels = checked(weight), self.levels
        scale = Magnitudes.of(wide).scale(levels)[0] if self.scale is None else self.scale
        return on_levels(weight, lambda magnitude: levels.nearest(magnitude / scale) * scale)

    def frozen(self, weight: Tensor) -> DeviceLevels:
        if self.scale is not None:
            return self
        magnitudes = Magnitudes.of(checked(weight))
        return replace(self, scale=magnitudes.scale(self.levels)[0]) if magnitudes.count else self

    def places(self, weight: Tensor) -> Tensor:
        """For a weight on the levels of a known scale the index of each one's magnitude, from 1.

        0 where it is zero.
        """
        assert self.scale is not None
        return torch.where(weight == 0, 0, 1 + self.levels.index(checked(weight).abs() / self.scale))

    def __str__(self) -> str:
        return f"{len(self.magnitudes)} device levels{'' if self.scale is None else f' of {self.scale:.3g}'}"
