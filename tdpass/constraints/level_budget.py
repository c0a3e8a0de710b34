"""Bits of the surviving weights of many layers from one total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tdpass.constraints.allocation import Options, allocate
from tdpass.constraints.base import Constraint, Shared, checked
from tdpass.constraints.levels import UniformLevels
from tdpass.constraints.magnitudes import Magnitudes
from tdpass.errors import PlanError, UsageError


@dataclass(frozen=True)
class LevelBudget(Shared):
    """min sum_l s_l ||W_l - Q_b(W_l)||^2 / ||W_l||^2 with sum_l b_l survivors_l <= limit, in bits.

    B bits are 2^(b-1) levels on each side of zero. Survivors are the weights that are not zero.
    `sensitivity` holds s where it is not 1.  Chosen on the convex hulls of the layers' error against bits.
    Raises `BudgetError` naming the least reachable.
    """

    limit: int
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    bits: tuple[int, ...] = tuple(range(1, 9))

    def __post_init__(self) -> None:
        if not self.bits or not all(1 <= b <= 8 for b in self.bits):
            raise UsageError(f"bits={self.bits} of weights to choose from are not within 1 to 8")
        wrong = {name: value for name, value in self.sensitivity.items() if not value >= 0}
        if wrong:
            raise UsageError(f"sensitivities {wrong} are not numbers of 0 or more")

    def divide(self, weights: Mapping[str, Tensor]) -> dict[str, Constraint]:
        unknown = set(self.sensitivity) - set(weights)
        if unknown:
            raise PlanError(
                f"sensitivities are given for {', '.join(sorted(unknown))}; known weights: "
                f"{', '.join(weights)}"
            )
        options = {name: self._options(name, weight) for name, weight in weights.items()}
        chosen = allocate(options, self.limit, lambda value: f"{int(value):,} bits")
        return {name: UniformLevels(_levels(self.bits[k])) for name, k in chosen.items()}

    def _options(self, name: str, weight: Tensor) -> Options:
        magnitudes = Magnitudes.of(checked(weight))
        whole = float(magnitudes.squares.sum()) or 1.0
        errors = [magnitudes.interval(_levels(b))[1] / whole for b in self.bits]
        return Options(
            np.array(self.bits, dtype=float) * magnitudes.count,
            self.sensitivity.get(name, 1.0) * np.array(errors),
        )


def _levels(bits: int) -> int:
    return int(2 ** (bits - 1))
