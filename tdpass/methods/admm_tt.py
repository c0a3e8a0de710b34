"""ADMM-TT: train towards a format of given ranks, then factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from tdpass.constraints.base import Constraint
from tdpass.constraints.in_format import InFormat
from tdpass.cost import BudgetValue
from tdpass.errors import UsageError
from tdpass.formats.base import FORMATS, Rank
from tdpass.methods.base import register_method
from tdpass.methods.factored import Factored
from tdpass.planner.rank_plan import RankPlan
from tdpass.training.admm import Rule, fixed
from tdpass.training.schedules import ScheduleSpec
from tdpass.verbs import make_plan

RankSpec = Sequence[int] | Mapping[str, Sequence[int]]


@register_method
@dataclass
class AdmmTT(Factored):
    """min f(W) over W of tensor-train ranks <= r, by ADMM (Yin, Sui, Liao, Yuan, CVPR 2021).

    Every round  Z <- TT-SVD_r(W + U),  U <- U + W - Z;  every step adds rho (W - Z + U) to the gradient; at the end W <- TT-SVD_r(W)
    as cores.  Another `format` makes it ADMM-Tucker, ADMM-SVD and so on.

    The ranks are fixed before the first round: by `ranks` (globs of site names to ranks, or to `{format: ranks}`; the first match
    counts, what matches none stays dense), by a plan in `start` (which may mix formats) or a budget there for the planner to make one of on the
    calibration data, or by a `budget` on the params or macs of the whole model, which is divided over the sites by the energy that
    their weights lose (`RankBudget`).  Without rounds it is direct factorization.
    """

    name = "admm-tt"

    budget: Mapping[str, BudgetValue] | None = None
    format: str = "tensor_train"
    ranks: Mapping[str, RankSpec] | None = None
    start: RankPlan | Mapping[str, BudgetValue] | None = None
    rounds: int = 20
    rho: ScheduleSpec = 1e-3
    decoupled: bool = False
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    constraints: dict[str, Constraint] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        FORMATS.get(self.format)
        given = [name for name, value in (("budget", self.budget), ("ranks", self.ranks), ("start", self.start)) if value is not None]
        if len(given) != 1:
            raise UsageError(f"{self.name} takes exactly one of budget, ranks and start, not {' and '.join(given) or 'none'}; give budget={{'params': 0.3}}")

    @torch.no_grad()
    def choose(self, model: nn.Module) -> None:
        if self.budget is not None:
            self.constraints = self.rank_budget(self.budget).divide(self.weights_of(model))
        else:
            ranks = self._by_glob(self.ranks or {}) if self.start is None else self._by_plan(self._planned(model, self.start))
            self.constraints = {name: InFormat(self.sites[name], *found) for name, found in ranks.items()}
        if not any(isinstance(bound, InFormat) for bound in self.constraints.values()):
            raise UsageError(f"no site gets ranks; the sites are: {', '.join(self.sites)}")

    def _planned(self, model: nn.Module, start: RankPlan | Mapping[str, BudgetValue]) -> RankPlan:
        if isinstance(start, RankPlan):
            return start
        steps = "plan{joint=false}"  # what changes two sites together is no set for one weight
        made = make_plan(model, start, self.calibration, pipeline=steps, example_inputs=self.example, include=self.include, exclude=self.exclude)
        return made.plan

    def _by_plan(self, plan: RankPlan) -> dict[str, tuple[str, Rank]]:
        return {choice.site: (choice.format, choice.rank) for choice in plan if choice.site in self.sites and not choice.kept_dense}

    def _by_glob(self, ranks: Mapping[str, RankSpec]) -> dict[str, tuple[str, Rank]]:
        found: dict[str, tuple[str, Rank]] = {}
        for name, site in self.sites.items():
            spec = next((spec for glob, spec in ranks.items() if fnmatchcase(name, glob)), None)
            if isinstance(spec, Mapping):
                found[name] = next((form, tuple(rank)) for form, rank in spec.items())
            elif spec is not None:
                found[name] = (self.format_of(site), tuple(spec))
        return found

    def rule(self) -> Rule:
        return fixed({name: bound for name, bound in self.constraints.items() if isinstance(bound, InFormat)})
