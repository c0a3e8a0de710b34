"""project-channels: fewer channels between layers, as mixtures or as a selection of those that were there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from tdpass.cost import Budget, BudgetValue, Cost, bounded
from tdpass.digest import digest
from tdpass.errors import BudgetError, UsageError
from tdpass.job import Job
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.effort import effort_named
from tdpass.planner.joint import joint_layers, joint_options, put
from tdpass.planner.joint.project_channels import NARROWINGS
from tdpass.planner.joint.prune_channels import KEEP_SHARES
from tdpass.planner.joint.prune_gated import PruneGated
from tdpass.planner.rank_plan import RankPlan
from tdpass.planner.sensitivity import Sweep
from tdpass.planner.table import Table
from tdpass.planner.trials import Promise
from tdpass.planner.widths import checked_share
from tdpass.site import Site, selects


@register_pass
@dataclass(frozen=True)
class ProjectChannels(Pass):
    """Narrow the runs of dense layers that feed each other; what comes out is dense, with no layer between.

    `how`: "learned" mixtures, "principal" ones, or channels selected by "norm", "taylor" or "median".
    `keep` is the share of channels left at every joint, also of gated MLPs, whose channels are selected for
    what reads them whatever `how` is; with a budget among the options (`macs=0.7`) the shares of all runs
    are chosen under it, by the divergence that they are measured to cause.  Sites that take no part are
    declined with the reason.
    """

    name = "project-channels"
    promise = Promise.PLAN

    gathers = MappingProxyType({"bounds": bounded})

    bounds: Mapping[str, BudgetValue] = field(default_factory=dict)
    how: str = "learned"
    keep: float = 0.75

    def run(self, model: Model, job: Job) -> bool:
        if self.how not in NARROWINGS:
            raise UsageError(
                f"how={self.how!r} is not known to {self.name}; it is one of {', '.join(NARROWINGS)}"
            )
        checked_share(self.keep, "macs=0.7")
        sites = [
            site
            for site in model.sites()
            if model.layer(site.name) is None and selects(site.name, job.include, job.exclude)
        ]
        tapes = job.tapes(model)
        if not tapes or not sites:
            job.note("skipped: there is no calibration data" if sites else "skipped: no site is dense")
            return False
        plan = self._plan(model, job, sites)
        chosen = {choice.site: choice for choice in plan if choice.joint}
        named = {site.name: site for site in sites}
        for found in (
            joint_layers(chosen, named, model.weight, model.bias, tapes, job.fitted_divergence)
            if chosen
            else ()
        ):
            put(model, found.layers, found.heads)
        before = [choice for choice in job.plan or () if choice.site not in named]
        # the model that was planned on lacks what these have saved, which their own costs say too
        saved = sum((choice.dense - choice.cost for choice in before), Cost())
        job.plan = replace(
            plan, choices=(*before, *plan.choices), prepared=(plan.prepared or plan.original) + saved
        )
        job.report.sites, job.report.metric, job.report.divergence = (
            job.plan.rows(),
            plan.metric,
            plan.divergence,
        )
        job.expected = (job.expected or 0.0) + plan.loss
        job.note(f"{len(chosen)} of {len(sites)} dense layers are narrower")
        return bool(chosen)

    def _plan(self, model: Model, job: Job, sites: list[Site]) -> RankPlan:
        tapes, effort = job.tapes(model), effort_named(job.effort).of(job.original.macs)
        shares = KEEP_SHARES if self.bounds else (self.keep,)
        change, gated = NARROWINGS[self.how](shares), PruneGated(shares)
        named = {site.name: site for site in sites}
        gates = {name for group in gated.find(tapes, named) for name in group}
        declined = {
            name: reason for name, reason in change.declined(tapes, named).items() if name not in gates
        }
        for name, reason in declined.items():
            job.report.decline(name, f"its channels stay: {reason}")
        sweep = Sweep(tapes, job.fitted_divergence, effort.for_losses(len(sites)))
        table = Table(
            tuple(sites), {}, fingerprints={site.name: digest(model.weight(site.name)) for site in sites}
        )
        table.metric, table.divergence = (
            "inputs and outputs on the calibration data",
            str(job.fitted_divergence),
        )
        table.prepared = job.prepared(model)
        table.joint = joint_options(
            named,
            model.weight,
            model.bias,
            effort.for_moments(tapes),
            sweep,
            job.progress,
            effort.limit,
            [change, gated],
        )
        try:
            return table.plan(Budget.parse(self.bounds) if self.bounds else Budget(), job.original)
        except BudgetError as error:
            if not declined:
                raise
            name, reason = next(iter(declined.items()))
            raise BudgetError(
                f"{error}; the channels of {len(declined)} sites stay, those of {name!r} as {reason}"
            ) from None
