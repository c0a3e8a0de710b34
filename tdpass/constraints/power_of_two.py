"""power_of_two_levels: every weight that is not zero is a power of two, so that a product is a shift."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.constraints.magnitudes import Magnitudes, on_levels
from tdpass.errors import UsageError

_RANGE = 64


@register_constraint
@dataclass(frozen=True)
class PowerOfTwoLevels(Constraint):
    """Levels `+-2^e` for the `count` exponents up to `exponent`.

    Zeros stay and other weights never become zero (Zhou et al., INQ, 2017). Without an `exponent` the
    projection takes that of least squared error.
    """

    count: int
    exponent: int | None = None
    name = "power_of_two_levels"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"count={self.count} powers of two are too few; give 1 or more")

    @property
    def bits(self) -> int:
        """Bits that hold one surviving weight: its sign and its exponent."""
        return 1 + math.ceil(math.log2(self.count))

    def project(self, weight: Tensor) -> Tensor:
        wide = checked(weight)
        top = self._best(wide) if self.exponent is None else self.exponent
        return on_levels(weight, lambda magnitude: self._nearest(magnitude, top))

    def frozen(self, weight: Tensor) -> PowerOfTwoLevels:
        wide = checked(weight)
        return (
            self
            if self.exponent is not None or not bool(wide.any())
            else replace(self, exponent=self._best(wide))
        )

    def _best(self, weight: Tensor) -> int:
        magnitudes = Magnitudes.of(weight)
        if magnitudes.count == 0:
            return 0
        means = magnitudes.means
        high = math.ceil(math.log2(float(means.max())))
        tops = range(high, max(math.floor(math.log2(float(means.min()))), high - _RANGE) - 1, -1)
        errors = torch.stack([magnitudes.errors(self._nearest(means, top)) for top in tops])
        return tops[int(errors.argmin())]

    def _nearest(self, magnitude: Tensor, top: int) -> Tensor:
        # 2^e is nearest from 1.5 2^(e - 1), half way to the power below, up to 1.5 2^e
        exponent = torch.log2(magnitude / 1.5).floor_().add_(1).clamp_(top - self.count + 1, top)
        return torch.exp2(exponent)

    def __str__(self) -> str:
        largest = "" if self.exponent is None else f" up to 2^{self.exponent}"
        return f"{self.count} power{'' if self.count == 1 else 's'} of two{largest}"
