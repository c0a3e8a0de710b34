"""Ranks of many layers at a price, each weighed in closed form against what it keeps of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tdpass.constraints.allocation import Options
from tdpass.constraints.base import Constraint, Shared, checked
from tdpass.constraints.rank_budget import RankBudget
from tdpass.errors import UsageError


@dataclass(frozen=True)
class RankPenalty(Shared):
    """min_Z sum_l 1/2 ||V_l - Z_l||^2 + strength * price_l(rank Z_l) (Idelbayev, Carreira-Perpinan 2020).

    Layer by layer the minimum is a truncated singular value decomposition whose rank is found by trying all:
    1/2 sum_{i>r} s_i^2 + strength * price(r); the dense layer, which loses nothing, is one of the choices.
    Energies are absolute: a layer of small weights gives up its ranks first.

    `within` holds sites, formats, prices and the most that all may cost together (`math.inf` for any cost);
    where the penalty alone does not get there, the strength is what the limit takes (`RankBudget`).
    """

    within: RankBudget
    strength: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise UsageError(
                f"strength={self.strength} of a rank penalty is no price; give a number of 0 or more"
            )

    def divide(self, weights: Mapping[str, Tensor]) -> dict[str, Constraint]:
        energy = {name: float(checked(weight).double().square().sum()) for name, weight in weights.items()}
        ranks = replace(self.within, sensitivity=energy)
        options = ranks.options(weights)
        chosen = {name: self._cheapest(found) for name, (_, found) in options.items()}
        if sum(float(found.costs[chosen[name]]) for name, (_, found) in options.items()) > ranks.limit:
            return ranks.allocated(options)
        return {name: ranks.constraint(name, found, chosen[name]) for name, (found, _) in options.items()}

    def _cheapest(self, options: Options) -> int:
        return int(np.argmin(options.losses / 2 + self.strength * options.costs))
