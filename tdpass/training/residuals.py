"""How far weights are from where they shall end, round by round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tdpass.errors import TrainingError


@dataclass
class Watch:
    """Stops a run whose residuals ||W - Z|| / ||W|| grow.

    A weight's residual may grow while its set shrinks; a run is stopped once it has grown in `patience`
    rounds in a row, to more than `factor` times what it was before them, and is no longer small (`above`).
    """

    patience: int = 6
    factor: float = 3.0
    above: float = 1.0
    history: dict[str, list[float]] = field(default_factory=dict)

    def check(self, residuals: Mapping[str, float]) -> None:
        """Take in the residuals of a round; raises `TrainingError` naming the weight and what to change."""
        for name, value in residuals.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"the weight {name!r} is no longer finite; lower the learning rate, or clip gradients"
                )
            seen = self.history.setdefault(name, [])
            if seen and value <= seen[-1]:
                seen.clear()
            seen.append(value)
            if len(seen) > self.patience and value > self.above and value > self.factor * seen[0]:
                raise TrainingError(
                    f"ADMM diverges: the distance of {name!r} to its constraint grew from {seen[0]:.3g} to "
                    f"{value:.3g} of its norm in {len(seen) - 1} rounds; "
                    "raise rho (or let it grow: geometric), lower the learning rate, or loosen the constraint"
                )
