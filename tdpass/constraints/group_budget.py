"""Numbers of groups kept in the blocks of many layers from one total of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.constraints.base import Constraint, Shared, checked
from tdpass.constraints.in_block import InBlock, Side
from tdpass.errors import BudgetError


@dataclass(frozen=True)
class GroupBudget(Shared):
    """At most `keep` weights, in whole rows or columns of blocks (`InBlock`), the worthiest groups.

    Those are the groups whose weights are worth most. A group is worth its mean square over that of its
    layer, or with a `metric` m for all layers, what its weights are worth to the loss, the mean of m w^2.
    Every layer keeps a share of at least `least` of its groups, and one.  Raises `BudgetError` naming the
    least reachable.
    """

    keep: int
    side: Side = "column"
    block: tuple[int, int] = (32, 32)
    least: float = 0.0
    metric: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def divide(self, weights: Mapping[str, Tensor]) -> dict[str, Constraint]:
        groups = InBlock(1, self.side, self.block)
        sizes, scores, first = {}, {}, {}
        for name, weight in weights.items():
            energy = groups.energies(checked(weight).square().double()).reshape(-1).cpu()
            count = groups.energies(torch.ones_like(checked(weight))).reshape(-1).cpu()
            # the order in which a projection takes them, and what the next one is worth at most
            order = energy.argsort(descending=True, stable=True)
            sizes[name] = count[order]
            scores[name] = (self._worth(name, weight, groups)[order] / sizes[name]).cummin(0).values
            first[name] = max(1, round(self.least * len(order)))
        spent = sum(int(sizes[name][: first[name]].sum()) for name in weights)
        if spent > self.keep:
            raise BudgetError(
                f"budget of {self.keep:,} weights is below the smallest reachable ({spent:,}); raise it, or "
                f"lower least={self.least}"
            )
        counts = _split(
            {name: scores[name][first[name] :] for name in weights},
            {name: sizes[name][first[name] :] for name in weights},
            self.keep - spent,
        )
        return {name: InBlock(first[name] + counts[name], self.side, self.block) for name in weights}

    def _worth(self, name: str, weight: Tensor, groups: InBlock) -> Tensor:
        squares = checked(weight).square().double()
        known = self.metric.get(name)
        squares = squares / squares.mean().clamp_min(1e-300) if known is None else squares * known.to(squares)
        return groups.energies(squares).reshape(-1).cpu()


def _split(scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor], room: int) -> dict[str, int]:
    """How many groups of each name are among those of largest score that fit.

    The first that does not ends it.
    """
    pool = torch.cat([*scores.values()])
    owner = torch.cat([torch.full((len(found),), index) for index, found in enumerate(scores.values())])
    order = pool.argsort(descending=True, stable=True)
    fitting = torch.cat([*sizes.values()])[order].cumsum(0) <= room
    counts = torch.bincount(owner[order][fitting], minlength=len(scores)).tolist()
    return dict(zip(scores, counts, strict=True))
