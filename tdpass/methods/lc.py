"""LC: the rank of every layer at a price, by alternating training and a choice in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tdpass.constraints.base import Constraint
from tdpass.constraints.in_format import InFormat
from tdpass.constraints.rank_budget import RankBudget
from tdpass.constraints.rank_penalty import RankPenalty
from tdpass.cost import Budget, BudgetValue
from tdpass.errors import UsageError
from tdpass.form import Rank
from tdpass.methods.base import register_method
from tdpass.methods.factored import FactoredByAdmm
from tdpass.methods.tariff import price_on_target
from tdpass.targets import Target
from tdpass.training.rules import Rule
from tdpass.training.schedules import Geometric, ScheduleSpec, as_schedule

OneMatrix = Literal["channel_svd", "spatial_svd"]
_GROWING = Geometric(1e-3, 1e-1)


@register_method
@dataclass
class Lc(FactoredByAdmm):
    """min f(W) + penalty * sum_l cost_l(r_l) / cost(dense) with rank W_l = r_l, over W and r.

    Idelbayev, Carreira-Perpinan: Low-rank Compression of Neural Nets: Learning the Rank of Each Layer, CVPR
    2020. Learning and compression take turns: every step adds rho (W - Z + U) to the gradient; every round
    chooses min_{r, Z} rho/2 ||W + U - Z||^2 + penalty * cost(r) in closed form, layer by layer
    (`RankPenalty`).  rho grows, so that the ranks follow the price first and the weights last.

    The price is counted in multiply-adds where the model was seen running, else in parameters, or with a
    `target` in what it tells first, for calls of `batch` samples on `threads` threads.  A `budget` bounds the
    whole model as that of `Batude` does; where the penalty alone stays above it, it is the smallest price
    that meets it.
    """

    name = "lc"

    penalty: float = 0.0
    budget: Mapping[str, BudgetValue] | None = None
    format: OneMatrix = "channel_svd"
    target: str | Target | None = None
    batch: int = 1
    threads: int = 1
    rounds: int = 20
    rho: ScheduleSpec = _GROWING
    decoupled: bool = False
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    cache: Path | None = None
    ranks: dict[str, Rank | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.format not in get_args(OneMatrix):
            raise UsageError(
                f"format={self.format!r} is unknown to {self.name}; known: {', '.join(get_args(OneMatrix))}"
            )
        if not (math.isfinite(self.penalty) and self.penalty >= 0) or not (self.penalty or self.budget):
            options = f"penalty={self.penalty}, budget={self.budget}"
            raise UsageError(
                f"{options} put no price on ranks; give {self.name} a penalty above 0, such as 0.5, or a "
                "budget"
            )
        as_schedule(self.rho, "rho")

    @torch.no_grad()
    def choose(self, model: nn.Module) -> None:
        budget = None if self.budget is None else Budget.parse(self.budget)
        price = price_on_target(self, budget, self.format_of)
        formats = {name: self.format_of(site) for name, site in self.sites.items()}
        seen = all(site.seen for site in self.sites.values())
        unbounded = RankBudget(
            self.sites, formats, math.inf, price or ("macs" if seen else "params"), progress=self.progress
        )
        self.within = unbounded if budget is None else self.rank_budget(budget, price)
        self.whole = sum(self.within.cost_of(name, None) for name in self.sites)
        self.within.divide(self.weights_of(model))  # an impossible budget is refused before training

    def rule(self) -> Rule:
        return self._divided

    def _divided(self, progress: float, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        rho = as_schedule(self.rho, "rho").value(progress)
        found = RankPenalty(self.within, self.penalty / (rho * self.whole)).divide(weights)
        self.ranks = {
            name: bound.rank if isinstance(bound, InFormat) else None for name, bound in found.items()
        }
        return {name: bound for name, bound in found.items() if isinstance(bound, InFormat)}

    def constraints(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        if not self.ranks:
            return self._divided(1.0, weights)
        kept = {name: rank for name, rank in self.ranks.items() if rank is not None}
        return {
            name: InFormat(self.sites[name], self.format_of(self.sites[name]), rank)
            for name, rank in kept.items()
        }

    def facts(self) -> dict[str, Any]:
        return {"ranks": self.ranks}

    def recall(self, facts: Mapping[str, Any]) -> None:
        self.ranks = {name: None if rank is None else tuple(rank) for name, rank in facts["ranks"].items()}
