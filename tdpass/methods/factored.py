"""What methods that end in factored layers share.

The plan carried out, and for some ADMM rounds on a format before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdpass.artifact import Artifact
from tdpass.constraints.base import Constraint
from tdpass.constraints.in_format import InFormat
from tdpass.constraints.rank_budget import Price, RankBudget
from tdpass.cost import Budget, BudgetValue, Cost
from tdpass.digest import digest
from tdpass.errors import BudgetError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import dense_cost, shrinks
from tdpass.measures import MEASURES, Needs, counted
from tdpass.methods.base import Method
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.site import Site
from tdpass.training.admm import Admm
from tdpass.training.phases import Phase, Phased
from tdpass.training.rules import Rule
from tdpass.training.schedules import ScheduleSpec, as_schedule
from tdpass.training.terms import Term
from tdpass.verbs import compress

WEIGHTS_ALONE = "factorize"
# what training left outside the format is lost where it matters least
ON_DATA = "factorize,correct-bias,refit,recalibrate-batchnorm"
OTHERWISE = ("svd", "channel_svd")  # for sites that the method's own format does not fit, the first that does
LARGE_GAP = (
    0.2  # residual at the end of ADMM from which on the final projection costs more than training gained
)


class Factored(Method):
    """`finish` factors every weight at the rank of its constraint.

    With calibration data it does so as the post-training path does, by what the network's output loses.  What
    comes out is trained on as any model is.  Batch-norms stay where they are.
    """

    format: str

    @abstractmethod
    def constraints(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        """The set that each of these whole, trained weights ends in; what is not named stays dense."""

    def merged(self, model: nn.Module) -> nn.Module:
        """A copy of a trained module, of the dense model's structure."""
        return self.template.filled(model)

    @torch.no_grad()
    def close(self, model: nn.Module) -> Artifact:
        trained = self.merged(model)
        weights = {name: weight.detach() for name, weight in self.weights_of(trained).items()}
        constraints = self.constraints(weights)
        plan = self.plan(weights, constraints)
        found = {
            name: bound.factors(weights[name])
            for name, bound in constraints.items()
            if isinstance(bound, InFormat) and bound.searched
        }
        steps = WEIGHTS_ALONE if self.calibration is None else ON_DATA
        artifact = compress(
            trained,
            data=self.calibration,
            plan=plan,
            start=found,
            pipeline=steps,
            example_inputs=self.example,
            cache=False,
            progress=self.progress,
        )
        for choice in artifact.plan:
            if not choice.kept_dense and not shrinks(self.sites[choice.site], choice.format, choice.rank):
                artifact.report.note(
                    f"{choice.site} is larger in a measure as {choice.format} of rank {choice.rank}, which "
                    "it was given, than dense"
                )
        return artifact

    def plan(self, weights: Mapping[str, Tensor], constraints: Mapping[str, Constraint]) -> RankPlan:
        """The plan that factors each weight as its constraint says."""
        choices = []
        for name, site in self.sites.items():
            dense, bound = dense_cost(site), constraints.get(name)
            if not isinstance(bound, InFormat):
                choices.append(
                    Choice(
                        name,
                        site.shape,
                        DENSE,
                        dense,
                        dense,
                        reason="factors that keep what it needs would not be cheaper",
                    )
                )
                continue
            weight, cost = weights[name], FORMATS.get(bound.format).cost(site, bound.rank)
            error = float((weight - bound.project(weight)).norm() / weight.norm().clamp_min(1e-30))
            reason = f"{self.name}, {Phased(self.phases()).rounds} rounds"
            choices.append(
                Choice(
                    name,
                    site.shape,
                    Form(bound.format, bound.rank),
                    cost,
                    dense,
                    error,
                    reason=reason,
                    fingerprint=digest(weight.cpu()),
                )
            )
        return RankPlan(tuple(choices), self.original, metric="weights")

    def rank_budget(
        self, budget: Mapping[str, BudgetValue] | Budget, price: Price | None = None, **options: Any
    ) -> RankBudget:
        """Ranks of all sites within a budget on the whole model, by the energy that their weights lose."""
        measure, limit = self.limit_of(budget, price)
        return RankBudget(
            self.sites,
            {name: self.format_of(site) for name, site in self.sites.items()},
            limit,
            price or measure,
            progress=self.progress,
            **options,
        )

    def limit_of(
        self, budget: Mapping[str, BudgetValue] | Budget, price: Price | None = None
    ) -> tuple[str, float]:
        """The measure that a budget on the whole model bounds, and what of it the sites' factors may take."""
        measure, limit = site_limit(budget, self.sites, self.original, price)
        if (
            measure == "params" and self.calibration is not None
        ):  # fitted to data, a layer without a bias gets one
            limit -= sum(site.o for site in self.sites.values() if not site.bias)
        return measure, limit

    def format_of(self, site: Site) -> str:
        """The method's format where it fits the site, else the plain factorization."""
        return next((name for name in (self.format, *OTHERWISE) if FORMATS.get(name).fits(site)), self.format)


class FactoredByAdmm(Factored):
    """ADMM towards a format for `rounds` rounds.

    `finish` factors every weight at the ranks of the last projection.
    """

    rounds: int
    rho: ScheduleSpec
    decoupled: bool

    @abstractmethod
    def rule(self) -> Rule:
        """What the weights are projected on."""

    def phases(self) -> Sequence[Phase]:
        return [Phase("admm", self.rounds, self._begin)]

    def _begin(self) -> list[Term]:
        return [Admm(self.weights, [self.rule()], as_schedule(self.rho, "rho"), self.decoupled)]

    def constraints(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        return self.rule()(1.0, weights)

    def remarks(self) -> Sequence[str]:
        name, gap = max(self.residuals().items(), key=lambda item: item[1], default=("", 0.0))
        said = (
            f"the last projection moves {name!r} by {gap:.2f} of its norm; a larger last rho, or more "
            "rounds, would leave it less to do"
        )
        return [said] if gap > LARGE_GAP else []


def site_limit(
    budget: Mapping[str, BudgetValue] | Budget,
    sites: Mapping[str, Site],
    original: Cost,
    price: Price | None = None,
) -> tuple[str, float]:
    """The one measure that a budget on the whole model bounds, and what of it is left for all these sites.

    What a target tells is that of the sites themselves, by `price`.  Raises `BudgetError` for a budget on
    several measures, on macs where the model was never seen running, or on what needs a target without one.
    """
    parsed = Budget.parse(budget)
    if len(parsed.bounds) != 1:
        raise BudgetError(
            f"budget {parsed} does not bound exactly one of {', '.join(counted())} and what a target tells; "
            f"give one, such as {{'params': 0.3}}"
        )
    ((measure, bound),) = parsed.bounds
    if MEASURES.get(measure).needs is Needs.TARGET:
        if price is None:
            raise BudgetError(
                f"a budget on {measure} needs a machine that tells them; pass target='cpu' to a method that "
                "takes it, or bound macs"
            )
        return measure, bound.limit(sum(price(site, None) for site in sites.values()))
    if measure == "macs" and not all(site.seen for site in sites.values()):
        raise BudgetError(
            "a budget on macs needs to see the model running; pass example_inputs=, or bound params"
        )
    total, own = original.get(measure), sum(dense_cost(site).get(measure) for site in sites.values())
    if own > total:
        raise BudgetError(
            f"budget {parsed} is on {total:,} {measure}, but the sites hold {own:,} as they are trained, in "
            "float32; bound params"
        )
    limit = bound.limit(total) - (total - own)
    if limit <= 0:
        raise BudgetError(
            f"budget {measure}={bound} of {total:,} leaves nothing for the {len(sites)} sites, which hold "
            f"{own:,}; raise it, or include more"
        )
    return measure, limit
