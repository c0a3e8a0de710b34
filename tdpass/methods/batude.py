"""BATUDE: a budget in, all Tucker ranks out, in one training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tdpass.constraints.base import Constraint
from tdpass.constraints.in_format import InFormat
from tdpass.cost import Budget, BudgetValue
from tdpass.errors import UsageError
from tdpass.form import Rank
from tdpass.formats.base import FORMATS
from tdpass.methods.base import register_method
from tdpass.methods.factored import FactoredByAdmm
from tdpass.methods.tariff import price_on_target
from tdpass.targets import Target
from tdpass.training.curvature import Curvature, Metric
from tdpass.training.rules import Rule
from tdpass.training.schedules import GROWING, ScheduleSpec
from tdpass.training.terms import Term


@register_method
@dataclass
class Batude(FactoredByAdmm):
    """min f(W) with sum_l cost_l(rank_l) <= B, the ranks found while training.

    By Yin, Phan, Zang, Liao, Yuan, AAAI 2022. Every round takes V = W + U, drops the singular values of its
    unfoldings that lose the least energy per unit of cost over the whole net until the budget is met
    (`RankBudget`), and projects V on the subspaces that are left: Z <- HOSVD(V), U <- U + W - Z. Ranks that
    did not change for `stable` rounds are kept to the end.  Layers that no factoring makes cheaper stay
    dense.

    `budget` bounds the params or macs of the whole model, or with a `target` the measured seconds of the
    sites, for calls of `batch` samples on `threads` threads.  Energy is a share of each layer's own; with
    `metric: fisher` times what the layer's weights are worth to the loss, ||W||^2 mean(F) (`Curvature`).
    """

    name = "batude"

    budget: Mapping[str, BudgetValue]
    format: str = "tucker2"
    target: str | Target | None = None
    batch: int = 1
    threads: int = 1
    rounds: int = 20
    stable: int = 3
    metric: Metric = "frobenius"
    rho: ScheduleSpec = GROWING
    decoupled: bool = True
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    cache: Path | None = None
    ranks: dict[str, Rank | None] = field(default_factory=dict, init=False, repr=False)
    unchanged: int = field(default=0, init=False, repr=False)
    curvature: Curvature | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        FORMATS.get(self.format)
        if self.metric not in get_args(Metric):
            raise UsageError(
                f"metric={self.metric!r} is unknown to {self.name}; known: {', '.join(get_args(Metric))}"
            )
        if self.stable < 1:
            raise UsageError(f"stable={self.stable} rounds are too few to call ranks settled; give 1 or more")

    @torch.no_grad()
    def choose(self, model: nn.Module) -> None:
        self.price = price_on_target(self, Budget.parse(self.budget), self.format_of)
        self.rank_budget(self.budget, self.price).divide(
            self.weights_of(model)
        )  # an impossible budget is refused before training

    def rule(self) -> Rule:
        return lambda progress, weights: self._divide(weights)

    def _divide(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        if self.unchanged < self.stable:
            keep = {name: rank for name, rank in self.ranks.items() if rank is not None}
            worth = {} if self.curvature is None else self.curvature.sensitivity(weights)
            found = self.rank_budget(self.budget, self.price, keep=keep, sensitivity=worth).divide(weights)
            ranks = {
                name: bound.rank if isinstance(bound, InFormat) else None for name, bound in found.items()
            }
            self.unchanged = self.unchanged + 1 if ranks == self.ranks else 0
            self.ranks = ranks
        return {
            name: InFormat(self.sites[name], self.format_of(self.sites[name]), rank)
            for name, rank in self.ranks.items()
            if rank is not None
        }

    def _begin(self) -> list[Term]:
        self.curvature = None if self.metric == "frobenius" else Curvature(self.weights)
        return [*([] if self.curvature is None else [self.curvature]), *super()._begin()]

    def facts(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "unchanged": self.unchanged}

    def recall(self, facts: Mapping[str, Any]) -> None:
        self.ranks = {name: None if rank is None else tuple(rank) for name, rank in facts["ranks"].items()}
        self.unchanged = int(facts["unchanged"])
