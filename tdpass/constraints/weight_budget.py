"""Numbers of weights kept in many layers from one total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tdpass.constraints.base import Constraint, Shared, checked
from tdpass.constraints.order_statistics import largest_first, nth_largest
from tdpass.constraints.sparse import Sparse
from tdpass.constraints.unconstrained import Unconstrained
from tdpass.errors import BudgetError, PlanError, UsageError

Score = Literal["magnitude", "relative", "lamp"]


@dataclass(frozen=True)
class WeightBudget(Shared):
    """The `keep` weights of largest score over all layers; how many of them a layer has is how many it keeps.

    `magnitude`: `|w|`.  `relative`: `|w| / rms` of the layer.  `lamp`: `w^2` over the sum of the squares in
    the layer that are not smaller (Lee et al. 2021).  With a `metric` m for some layers, `w sqrt(m)` stands
    for w there: what a weight is worth to the loss, say.

    Layers in `dense` keep all, which counts; `least` and `most` bound the others, all at once or by name.
    Fewer than `keep` are kept where `most` says so.  Raises `BudgetError` naming the least reachable,
    `PlanError` for a name that is no weight.
    """

    keep: int
    score: Score = "magnitude"
    dense: tuple[str, ...] = ()
    least: int | Mapping[str, int] = 1
    most: Mapping[str, int] = field(default_factory=dict)
    metric: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise UsageError(f"unknown score {self.score!r} of weights; known: {', '.join(get_args(Score))}")

    def divide(self, weights: Mapping[str, Tensor]) -> dict[str, Constraint]:
        named = {*self.dense, *self.most, *(() if isinstance(self.least, int) else self.least)}
        if not named <= set(weights):
            raise PlanError(
                f"the weight budget names {', '.join(sorted(named - set(weights)))}; known weights: "
                f"{', '.join(weights)}"
            )
        stay = sum(weights[name].numel() for name in self.dense)
        free = {name: weight for name, weight in weights.items() if name not in self.dense}
        bounds = {name: self._bounds(name, weight.numel()) for name, weight in free.items()}
        room = self.keep - stay - sum(low for low, _ in bounds.values())
        if room < 0:
            raise BudgetError(
                f"budget of {self.keep:,} weights is below the smallest reachable ({self.keep - room:,}, of "
                f"which {stay:,} in layers that stay dense); "
                "raise it, or lower the least that layers keep"
            )
        scores = {
            name: self._scores(name, weight, min(self.keep, high))[low:]
            for name, weight in free.items()
            for low, high in [bounds[name]]
        }
        counts = _split(scores, room)
        return {
            name: Sparse(bounds[name][0] + counts[name], metric=self.metric.get(name))
            if name in free
            else Unconstrained()
            for name in weights
        }

    def _bounds(self, name: str, size: int) -> tuple[int, int]:
        low = self.least if isinstance(self.least, int) else self.least.get(name, 1)
        high = min(size, self.most.get(name, size))
        if high < 1 or low > self.most.get(name, low):
            raise UsageError(
                f"weight {name!r} is to keep at least {low} and at most {self.most.get(name)}; give 1 or "
                "more, and the least no larger"
            )
        return min(max(1, low), high), high

    def _scores(self, name: str, weight: Tensor, count: int) -> Tensor:
        """The `count` largest scores of one layer, descending, on the CPU."""
        worth = checked(weight).abs().reshape(-1)
        if name in self.metric:
            worth = worth * self.metric[name].to(worth).reshape(-1).sqrt()
        sizes = largest_first(worth, count).cpu()
        if self.score == "magnitude":
            return sizes
        if self.score == "relative":
            return sizes.double() / worth.double().square().mean().sqrt().cpu().clamp_min(1e-150)
        # the sum runs from the largest down, so it needs none of the smaller ones
        squares = sizes.double().square()
        return squares / squares.cumsum(0).clamp_min(1e-300)


def _split(scores: Mapping[str, Tensor], count: int) -> dict[str, int]:
    """How many of the `count` largest of all scores each name has; equal ones go to the first names."""
    pool = torch.cat([*scores.values(), torch.empty(0)])
    if count >= len(pool):
        return {name: len(values) for name, values in scores.items()}
    if count == 0:
        return dict.fromkeys(scores, 0)
    edge = nth_largest(pool, count)
    found = {name: int((values > edge).count_nonzero()) for name, values in scores.items()}
    left = count - sum(found.values())
    for name, values in scores.items():
        more = min(left, int((values == edge).count_nonzero()))
        found[name] += more
        left -= more
    return found
