"""plan: decide what every site becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

from tdpass.cost import Budget, BudgetValue, bounded
from tdpass.digest import digest
from tdpass.errors import BudgetError, UsageError
from tdpass.form import DENSE, Form
from tdpass.job import Job
from tdpass.measures import MEASURES, Needs
from tdpass.models.base import Model, call_batch, few_samples
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.cache import CandidateCache
from tdpass.planner.effort import effort_named
from tdpass.planner.joint import carries
from tdpass.planner.offers import EVERYTHING, NOTHING, Offer
from tdpass.planner.planning import Dense, Tabulation
from tdpass.planner.rank_plan import RankPlan
from tdpass.planner.stopwatch import prices_on
from tdpass.planner.table import Table
from tdpass.planner.timed import plan_on_target, price_table
from tdpass.planner.trials import Promise
from tdpass.report import CurvePoint
from tdpass.site import Site, selects
from tdpass.targets import TARGETS, Target
from tdpass.views.summary import by_reason

AUTO, NONE = "auto", "none"
_MOST_NAMES = 6
FEW_BYTES = 0.25  # what integers of a byte leave of single precision


@register_pass
@dataclass(frozen=True)
class Plan(Pass):
    """Candidates of all formats and ranks per site, their measured losses, the exact choice under the budget.

    Options override the budget of the job: `bounds` by measure, each of which is an option of that name.
    `joint` also tries options that change neighbouring sites together. `effort`: fast (losses from the metric
    alone), normal (losses measured for about a minute) or thorough; default: the job's. `numbers`: number
    types, joined by +, that sites may be stored in under a budget on bytes, or on what a target charges by
    the bit, and `supports`: supports of weights, likewise; `beside`: ranks, joined by +, of factors beside
    which the rest of a weight is stored in each number type of at most four bits.  `auto` offers some of each
    under a budget of at most a quarter of the bytes, and under one that cannot be met without, and on such a
    target its number types; `none` offers none. `pivot`: factors without what they hold twice, as the pass
    `pivot` makes them, at their lower cost. The model itself is not changed.
    """

    name = "plan"
    promise = Promise.SAME

    gathers = MappingProxyType({"bounds": bounded})

    bounds: Mapping[str, BudgetValue] = field(default_factory=dict)
    max_error: float | None = None
    joint: bool = True
    effort: str | None = None
    numbers: str = "auto"
    supports: str = ""
    beside: str = ""
    pivot: bool = False

    def run(self, model: Model, job: Job) -> bool:
        budget = self._budget(job)
        done = job.carried_out(model)
        if job.target is None:
            job.settle(model)
        sites = _selected(model, job)
        _check_known(budget, job)
        effort = effort_named(self.effort or job.effort).of(job.original.macs, job.pace)
        tapes = job.tapes(model)
        tabulation = Tabulation(
            sites,
            Dense(model.weight, model.bias, _forms(sites, model)),
            tapes,
            job.fitted_divergence,
            job.formats,
            CandidateCache(job.cache),
            self._context(model, job, sites),
            job.progress,
            job.target,
            effort,
            pivot=self.pivot,
        )

        def tabulated(offer: Offer) -> Table:
            table = replace(tabulation, offer=offer).table()
            table.prepared = job.prepared(model)
            if self.joint and effort.measured and tapes and not job.formats and budget.max_error is None:
                able = partial(carries, model, few_samples(model, job.batches))
                tabulation.add_joint_options(table, able)
            return table

        offer = _held(self._offer(budget, job), model, job)
        table = tabulated(offer)
        if job.target is not None:
            plan, table = self._on_target(job.target, table, budget, model, job)
        else:
            try:
                plan = table.settled(budget, job.original)
            except BudgetError:
                if offer or self.numbers != AUTO or "bytes" not in budget.measures:
                    raise
                table = tabulated(_held(EVERYTHING, model, job))
                plan = table.settled(budget, job.original)
        known = tapes and effort.measured
        before = job.lost if job.smaller else sum(choice.loss for choice in done)
        job.expected = before + plan.loss if known else None
        plan = plan.after(done) if done else plan
        job.plan, job.budget = plan, budget
        self._describe(table, plan, budget, job)
        if tapes:
            every = [candidate for candidates in table.candidates.values() for candidate in candidates]
            estimated = sum(candidate.estimated for candidate in every)
            job.note(f"effort {effort.name}: {len(every) - estimated} losses measured, {estimated} estimated")
        return False

    def _describe(self, table: Table, plan: RankPlan, budget: Budget, job: Job) -> None:
        """The plan in the report, with what was declined and the curve that it lies on."""
        report = job.report
        report.budget, report.metric, report.divergence = str(budget), plan.metric, plan.divergence
        report.sites = plan.rows()
        self._draw_curve(table, budget, job)
        for name, reason in table.declined.items():
            report.decline(name, reason)
        for reason, names in by_reason(table.apart).items():
            job.note(f"{_listed(names)}: {reason}")
        changed = sum(not choice.kept for choice in plan)
        job.note(
            f"{changed} of {len(plan.choices)} sites change; {sum(map(len, table.candidates.values()))} "
            f"candidates, {len(table.joint)} joint ones"
        )

    def _offer(self, budget: Budget, job: Job) -> Offer:
        """Number types and supports for the first try."""
        target, limit = job.target, budget.limits(job.original).get("bytes", math.inf)
        timed = target.measures if target is not None and target.numbers else ()
        counted = ("bytes",) if target is None else timed
        if not set(counted) & set(budget.measures):
            return NOTHING
        if self.numbers not in {AUTO, NONE}:
            return Offer.parse(self.numbers, self.supports, self.beside)
        if self.supports or self.numbers == NONE:
            return Offer.parse("", self.supports)
        if target is not None:
            return Offer(target.numbers)
        return EVERYTHING if limit <= FEW_BYTES * job.original.bytes else NOTHING

    def _on_target(
        self, target: Target, table: Table, budget: Budget, model: Model, job: Job
    ) -> tuple[RankPlan, Table]:
        """The plan by what the target says, and the table with that.

        The model as it is now becomes what the result is held against.
        """
        dtypes = {site.name: model.weight(site.name).dtype for site in table.sites}
        prices = prices_on(target, budget, job.batch, job.threads, dtypes)
        price_table(table, prices, job.progress)
        measure = prices.measures[0]
        largest = max(table.sites, key=lambda site: prices.priced(site, table.dense(site)).cost.get(measure))
        (whole,) = target.cost_models(
            [model], lambda: call_batch(model, job.batches, job.batch), prices.setting(largest), largest
        )
        scaled = prices.scale_to(whole, table.sites)
        if scaled:
            job.note(scaled)
        job.dense = model.clone()
        job.original = job.report.original = whole.recounted(job.original)
        found = plan_on_target(table, budget, job.original, prices, job.progress)
        for note in target.notes:
            job.report.note(note)
        return found.plan, found.table

    def _budget(self, job: Job) -> Budget:
        own = {**self.bounds, **({} if self.max_error is None else {"max_error": self.max_error})}
        if own:
            return Budget.parse(own)
        if job.budget is None:
            raise BudgetError(
                "there is no budget; pass budget={'macs': 0.4}, or write the pass as plan{macs=0.4}"
            )
        return job.budget

    def _context(self, model: Model, job: Job, sites: list[Site]) -> str:
        if not job.batches:
            return ""
        tensors = [tensor for batch in job.batches for tensor in batch.tensors]
        weights = [
            weight for site in model.sites() for weight in (model.weight(site.name), model.bias(site.name))
        ]
        answers = [value for outputs in job.references for value in outputs.values()]
        counted = [
            f"{name} {one.comparison.name} {one.weight}"
            for name, one in job.fitted_divergence.comparisons.items()
        ]
        return digest(
            *counted, str(model.params()), ",".join(site.name for site in sites), *weights, *tensors, *answers
        )

    def _draw_curve(self, table: Table, budget: Budget, job: Job) -> None:
        assert job.plan is not None
        usual = "macs" if job.original.macs else "params"
        measure = (*budget.measures, usual)[0]
        points = [*((share, plan, False) for share, plan in table.curve(measure, job.original))]
        reached = job.plan.planned.get(measure) / (job.original.get(measure) or 1)
        points.append((reached, job.plan, True))
        job.report.curve = [_curve_point(*point) for point in sorted(points, key=lambda point: -point[0])]


def _curve_point(share: float, plan: RankPlan, chosen: bool) -> CurvePoint:
    macs, params = (plan.planned.get(name) / max(plan.original.get(name), 1) for name in ("macs", "params"))
    forms = {choice.site: choice.form for choice in plan if choice.form != DENSE}
    return CurvePoint(share, macs, params, plan.loss, chosen, forms)


def _check_known(budget: Budget, job: Job) -> None:
    """Raises `BudgetError` for a measure that nothing here can tell."""
    for name in budget.measures:
        needs = MEASURES.get(name).needs
        if needs is Needs.RUN and not job.original.get(name):
            raise BudgetError(
                f"a budget on {name} needs to see the model running; pass data= or example_inputs=, or "
                "bound params"
            )
        if needs is Needs.TARGET and (job.target is None or name not in job.target.measures):
            able = [target.name for target in TARGETS if name in target.measures]
            asked = (
                f"target {job.target.name} does not tell them"
                if job.target is not None
                else "and none was given"
            )
            use = f"pass target={able[0]!r} (--target {able[0]})" if able else "no target here tells them"
            raise BudgetError(
                f"a budget on {name} needs a machine that tells them, {asked}; {use}, or bound macs instead"
            )


def _selected(model: Model, job: Job) -> list[Site]:
    """The sites that include and exclude leave; the others are declined by name."""
    chosen: list[Site] = []
    for site in model.sites():
        layer = model.layer(site.name)
        if not selects(site.name, job.include, job.exclude):
            job.report.decline(site.name, "excluded by name")
        elif layer is not None and layer.form.narrow:
            job.report.decline(site.name, f"it is '{layer.form}' already, which goes with its neighbours")
        elif layer is not None and job.target is not None:
            job.report.decline(site.name, f"it is '{layer.form}' already, which is not timed again")
        else:
            chosen.append(site)
    if not chosen:
        raise UsageError(f"no site is left to compress: {_why_none(model, job)}")
    return chosen


def _forms(sites: Sequence[Site], model: Model) -> dict[str, Form]:
    """The forms of the sites that are in one already."""
    return {site.name: layer.form for site in sites if (layer := model.layer(site.name)) is not None}


def _held(offer: Offer, model: Model, job: Job) -> Offer:
    """The offer without number types and supports that the model refuses, which notes name."""
    forms = {text: replace(DENSE, numbers=(text,)) for text in offer.numbers}
    forms |= {text: replace(DENSE, support=text) for text in offer.supports}
    reasons = {text: model.refused(form) for text, form in forms.items()}
    for text, reason in reasons.items():
        if reason:
            job.note(f"{text} is not offered: {reason}")
    numbers, supports = (
        tuple(text for text in texts if not reasons[text]) for texts in (offer.numbers, offer.supports)
    )
    return replace(offer, numbers=numbers, supports=supports)


def _why_none(model: Model, job: Job) -> str:
    """What was asked for if that selects none of the sites, else why the model's layers are no sites."""
    names = [site.name for site in model.sites()]
    if names:
        return f"include={list(job.include)}, exclude={list(job.exclude)} select none of {_listed(names)}"
    declined = [f"{name or 'the model'}: {reason}" for name, reason in list(model.declined().items())[:4]]
    return "; ".join(declined) or "the model holds no linear or convolution layer with a weight of its own"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (" ..." if len(names) > _MOST_NAMES else "")
