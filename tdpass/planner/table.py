"""The table that every budget is decided from: the candidates of all sites with their losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tdpass.cost import Budget, Cost
from tdpass.errors import BudgetError
from tdpass.form import DENSE
from tdpass.planner.candidates import Candidate, dense_candidate
from tdpass.planner.frontier import with_loss, within
from tdpass.planner.joint import JointOption
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.planner.select import Option, cheapest, select
from tdpass.planner.settling import Settling
from tdpass.site import Site

_ROUNDS = 6
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass
class Table:
    """All candidates of all sites with their losses: what every budget is decided from.

    `present` holds the sites that are in some form already, `priced` the dense layers with what they cost on
    a target, where one said so; `settling` measures losses; `declined` says why a site has no candidates,
    `apart` why it takes no part in joint changes; `prepared` is the cost of the model with its sites as they
    are, where that is not the cost of the model that came in.
    """

    sites: tuple[Site, ...]
    candidates: dict[str, list[Candidate]]
    joint: list[JointOption] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    metric: str = "weights"
    divergence: str = ""
    present: dict[str, Candidate] = field(default_factory=dict)
    priced: dict[str, Candidate] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    prepared: Cost | None = None
    settling: Settling | None = None

    def dense(self, site: Site) -> Candidate:
        """The site as it is."""
        return self.present.get(site.name) or self.priced.get(site.name) or dense_candidate(site)

    def options(self, budget: Budget) -> list[Option]:
        """Everything that may be chosen under that budget's error limit; dense always."""
        found = [Option({site.name: self.dense(site)}, 0.0) for site in self.sites]
        for name, candidates in self.candidates.items():
            found += [Option({name: candidate}, candidate.loss) for candidate in within(candidates, budget)]
        if budget.max_error is None:
            found += [Option(joint.parts, joint.loss) for joint in self.joint]
        return found

    def plan(self, budget: Budget, original: Cost) -> RankPlan:
        """The best choice under a budget; `original` is the cost of the whole model."""
        names = [site.name for site in self.sites]
        prepared = original.recounted(self.prepared or original)
        fixed = prepared - sum((self.dense(site).cost for site in self.sites), Cost())
        options = self.options(budget)
        if budget.bounds:
            chosen = select(options, names, budget.limits(original), fixed)
        else:
            chosen = cheapest(options, names, "macs" if all(site.seen for site in self.sites) else "params")
        taken = [
            joint
            for joint in self.joint
            if all(chosen.get(name) is part for name, part in joint.parts.items())
        ]
        joint = {name: option for option in taken for name in option.parts}
        choices = tuple(
            self._choice(site, chosen[site.name], budget, joint.get(site.name)) for site in self.sites
        )
        return RankPlan(choices, original, str(budget), self.metric, self.divergence, prepared=prepared)

    def settled(self, budget: Budget, original: Cost) -> RankPlan:
        """The best choice, made again while it rests on losses that are estimated and can be measured."""
        plan = self.plan(budget, original)
        for _ in range(_ROUNDS):
            chosen = self._estimated(plan)
            losses = self.settling.losses(chosen) if chosen and self.settling is not None else {}
            if not losses or self.settling is None:
                break
            for name, loss in losses.items():
                self.candidates[name] = [
                    with_loss(candidate, loss) if candidate is chosen[name] else candidate
                    for candidate in self.candidates[name]
                ]
                self.settling.keep(name, self.candidates[name])
            plan = self.plan(budget, original)
        return plan

    def _estimated(self, plan: RankPlan) -> dict[str, Candidate]:
        """The candidates that a plan takes alone, whose losses are estimated."""
        forms = {choice.site: choice.form for choice in plan if not choice.joint}
        return {
            name: candidate
            for name, form in forms.items()
            for candidate in self.candidates.get(name, ())
            if candidate.form == form and candidate.estimated
        }

    def curve(self, measure: str, original: Cost) -> Iterator[tuple[float, RankPlan]]:
        """Plans over a range of budgets on one measure, as far as they can be met."""
        for share in CURVE:
            try:
                yield share, self.plan(Budget.parse({measure: share}), original)
            except BudgetError:
                return

    def _choice(self, site: Site, candidate: Candidate, budget: Budget, joint: JointOption | None) -> Choice:
        return Choice(
            site=site.name,
            shape=site.shape,
            form=candidate.form,
            cost=candidate.cost,
            dense=self.dense(site).cost,
            error=candidate.error,
            loss=candidate.loss,
            reason=self._reason(site, candidate, budget),
            guarantee=candidate.guarantee,
            fingerprint=self.fingerprints.get(site.name, ""),
            kernel=candidate.kernel,
            groups=site.groups,
            channels=() if joint is None else joint.channels,
            joint="" if joint is None else joint.change,
            given=str(self.dense(site).form),
        )

    def _reason(self, site: Site, candidate: Candidate, budget: Budget) -> str:
        now = self.dense(site)
        if candidate.form != now.form:
            estimated = "; its loss is estimated" if candidate.estimated else ""
            measure, noun = ("bytes", "bytes") if candidate.form.encoded else ("params", "parameters")
            return (
                f"{candidate.cost.get(measure) / max(now.cost.get(measure), 1):.0%} of the {noun}{estimated}"
            )
        if site.name in self.declined:
            return self.declined[site.name]
        every = self.candidates.get(site.name, [])
        if not every:
            return (
                f"no format is smaller than the {'dense layer' if now.form == DENSE else 'layer as it came'}"
            )
        allowed = within(every, budget)
        if not allowed:
            return f"every candidate errs by more than {budget.max_error:g}"
        mildest = min(allowed, key=lambda c: c.loss)
        return f"{now.form} is worth its cost: {mildest.form} would add {mildest.loss:.2g} to the loss"
