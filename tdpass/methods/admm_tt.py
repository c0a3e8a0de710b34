"""ADMM-TT: train towards a format of given ranks, then factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tdpass.constraints.in_format import InFormat
from tdpass.cost import BudgetValue
from tdpass.errors import UsageError
from tdpass.form import Rank
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.methods.base import register_method
from tdpass.methods.factored import ON_DATA, FactoredByAdmm
from tdpass.planner.rank_plan import RankPlan
from tdpass.training.placement import placed_like
from tdpass.training.rules import Rule
from tdpass.training.schedules import GROWING, ScheduleSpec
from tdpass.training.terms import Term
from tdpass.training.warm_starts import WarmStarts
from tdpass.verbs import compress, make_plan

RankSpec = Sequence[int] | Mapping[str, Sequence[int]]


@register_method
@dataclass
class AdmmTT(FactoredByAdmm):
    """min f(W) over W of tensor-train ranks <= r, by ADMM (Yin, Sui, Liao, Yuan, CVPR 2021).

    Every round  Z <- TT-SVD_r(W + U),  U <- U + W - Z;  every step pulls W along -rho (W - Z + U); at
    the end W <- TT-SVD_r(W) as cores.  Another `format` makes it ADMM-Tucker, ADMM-SVD and so on.

    The ranks are fixed before the first round: by `ranks` (globs of site names to ranks, or to `{format:
    ranks}`; the first match counts, what matches none stays dense), by a `budget` on the params or macs of
    the whole model, which is divided over the sites by the energy that their weights lose (`RankBudget`), or
    by a plan in `start`, which may mix formats, or a budget there for the planner to make one of, from
    `formats` where some are given.  Without rounds it is direct factorization.

    `cuts` is the number of ranks of tensor trains from a budget: two cut a convolution between its channels
    and its kernel, which allows the weights that `tucker2` does; four split the channels as well, as
    published.

    With `fit`, the default with `start`, the weights begin as the post-training path leaves them, in the
    format and fitted to calibration data, so that the rounds go on from its accuracy; formats that search
    (`cp`, `block_term`, `tensor_ring`) are searched from these factors.
    """

    name = "admm-tt"

    budget: Mapping[str, BudgetValue] | None = None
    format: str = "tensor_train"
    ranks: Mapping[str, RankSpec] | None = None
    start: RankPlan | Mapping[str, BudgetValue] | None = None
    formats: Sequence[str] = ()
    fit: bool | None = None
    cuts: int | None = None
    rounds: int = 20
    rho: ScheduleSpec = GROWING
    decoupled: bool = True
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    warm_starts: WarmStarts = field(init=False, repr=False)
    fitted: dict[str, Layer] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        FORMATS.get(self.format)
        given = [
            name
            for name, value in (("budget", self.budget), ("ranks", self.ranks), ("start", self.start))
            if value is not None
        ]
        if self.formats and not isinstance(self.start, Mapping):
            raise UsageError(
                f"formats={tuple(self.formats)} are for the planner to choose from, which has no budget; "
                f"give start={{'params': 0.3}}"
            )
        if len(given) != 1:
            raise UsageError(
                f"{self.name} takes exactly one of budget, ranks and start, not "
                f"{' and '.join(given) or 'none'}; give budget={{'params': 0.3}}"
            )
        if self.cuts is not None and (self.budget is None or self.format != "tensor_train"):
            raise UsageError(
                f"cuts={self.cuts} are for tensor trains at ranks from a budget, not for format "
                f"{self.format!r} by {given[0]}; leave them out"
            )

    @torch.no_grad()
    def choose(self, model: nn.Module) -> None:
        fits = self._fits()
        weights = self.weights_of(model)
        plan = (
            self.start
            if self.start is None or isinstance(self.start, RankPlan)
            else self._planned(model, self.start)
        )
        bounds = self._bounds(weights) if plan is None else self._bounds_of(plan)
        if not bounds:
            raise UsageError(f"no site gets ranks; the sites are: {', '.join(self.sites)}")
        if fits and self.rounds:
            self.fitted = self._fitted(model, self.plan(weights, bounds) if plan is None else plan, bounds)
        starts = {
            name: replace(bound, start=dict(self.fitted[name].factors)) if name in self.fitted else bound
            for name, bound in bounds.items()
        }
        self.warm_starts = WarmStarts({name: bound.near(weights[name]) for name, bound in starts.items()})

    def _fits(self) -> bool:
        if self.fit and self.calibration is None:
            raise UsageError(
                f"fit=True fits the weights {self.name} begins with to data, and there is none; pass "
                "calibration=, or leave fit out"
            )
        return self.calibration is not None and (self.start is not None if self.fit is None else self.fit)

    def _bounds(self, weights: Mapping[str, Tensor]) -> dict[str, InFormat]:
        if self.budget is None:
            return {
                name: InFormat(self.sites[name], *found)
                for name, found in self._by_glob(self.ranks or {}).items()
            }
        divided = self.rank_budget(self.budget, cuts=self.cuts).divide(weights)
        return {name: bound for name, bound in divided.items() if isinstance(bound, InFormat)}

    def _bounds_of(self, plan: RankPlan) -> dict[str, InFormat]:
        chosen = (choice for choice in plan if choice.site in self.sites and not choice.kept_dense)
        return {
            choice.site: InFormat(self.sites[choice.site], choice.format, choice.rank) for choice in chosen
        }

    def _fitted(self, model: nn.Module, plan: RankPlan, names: Iterable[str]) -> dict[str, Layer]:
        """The layers that the post-training path makes of these sites."""
        made = compress(
            model,
            data=self.calibration,
            plan=plan,
            pipeline=ON_DATA,
            example_inputs=self.example,
            progress=self.progress,
        ).model
        assert isinstance(made, nn.Module)
        modules = dict(made.named_modules())
        return {name: modules[name].layer() for name in names}

    def _planned(self, model: nn.Module, budget: Mapping[str, BudgetValue]) -> RankPlan:
        common: dict[str, Any] = {
            "example_inputs": self.example,
            "include": self.include,
            "exclude": self.exclude,
            "formats": self.formats,
        }
        # what changes two sites together is no set for one weight
        return make_plan(
            model, budget, self.calibration, pipeline="plan{joint=false}", progress=self.progress, **common
        ).plan

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
        return self.warm_starts.rule

    @torch.no_grad()
    def _begin(self) -> list[Term]:
        for name, layer in self.fitted.items():
            weight = self.weights[name]
            weight.copy_(placed_like(layer.reconstruct().to(weight.device, weight.dtype), weight))
        return [*super()._begin(), self.warm_starts]
