"""pivot: factors without what they hold twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdpass.cost import amount
from tdpass.errors import NumericalError
from tdpass.formats.base import Layer, cost_of
from tdpass.formats.pivoted import spared_formats
from tdpass.models.base import Model
from tdpass.pipeline import Job, Pass, register_pass
from tdpass.planner.rank_plan import Choice
from tdpass.planner.trials import Promise
from tdpass.site import Site
from tdpass.targets import Target, open_target
from tdpass.targets.base import Setting


@register_pass
@dataclass(frozen=True)
class Pivot(Pass):
    """Spare r^2 numbers and multiply-adds of every axis of r that two factors share; the output stays what it was, to rounding.

    A layer stays the chain that it is where that costs less, by what the job's target says, else as timed here; with `measure` false
    all change that can.  Meant for the end of a pipeline, before anything that stores factors in other number types: repairs and
    training work on plain chains.
    """

    name = "pivot"
    promise = Promise.SAME

    measure: bool = True

    def run(self, model: Model, job: Job) -> bool:
        target = (job.target or open_target("cpu", model.frontend, job.cache)) if self.measure else None
        layers = {site: layer for site in model.sites() if (layer := model.layer(site.name)) is not None}
        changed: dict[str, Layer] = {}
        for site, layer in layers.items():
            ways = _ways(layer, job)
            best = _cheapest(site, [layer, *ways], target, job) if target is not None and site.seen else ways[:1]
            if best and best[0] is not layer:
                changed[site.name] = best[0]
                model.replace(site.name, best[0])
        before = {site.name: layer for site, layer in layers.items() if site.name in changed}
        fewer = sum(_params(layer) - _params(changed[name]) for name, layer in before.items())
        job.note(f"{len(changed)} of {len(layers)} factored layers changed, {fewer:,} numbers fewer")
        _enter(changed, before, job)
        return bool(changed)


def _ways(layer: Layer, job: Job) -> list[Layer]:
    """The layer in every format that spares what it holds twice, the one that needs no order of channels first."""
    if layer.form.encoded:
        job.report.decline(layer.site.name, f"not pivoted: its factors are stored as '{layer.form}'; pivot before that")
        return []
    found, reasons = [], []
    for name in spared_formats(layer.format, layer.site, layer.rank):
        try:
            found.append(layer.converted(name))
        except NumericalError as error:
            reasons.append(str(error))
    if reasons and not found:
        job.report.decline(layer.site.name, f"not pivoted: {reasons[0]}")
    return found


def _cheapest(site: Site, layers: Sequence[Layer], target: Target, job: Job) -> list[Layer]:
    """The one that costs least on the target, where there is a choice; says why one stays as it is."""
    if len(layers) < 2:
        return []
    measure = target.measures[0]
    costs = [cost.get(measure) for cost in target.cost(site, [layer.form for layer in layers], Setting(job.batch, job.threads, layers[0].dtype))]
    best = min(range(len(layers)), key=costs.__getitem__)
    if best == 0:
        written = [amount(measure, cost) for cost in (costs[0], min(costs[1:]))]
        job.report.decline(site.name, f"not pivoted: {written[0]} as '{layers[0].form}', {written[1]} without what it holds twice")
    return [layers[best]]


def _params(layer: Layer) -> int:
    return cost_of(layer.site, layer.form).params


def _enter(changed: Mapping[str, Layer], before: Mapping[str, Layer], job: Job) -> None:
    """Write forms and costs of the layers that changed into the plan and its report."""
    if job.plan is None or not changed:
        return

    def entered(choice: Choice) -> Choice:
        if choice.site not in changed:
            return choice
        old, new = before[choice.site], changed[choice.site]
        less = cost_of(old.site, old.form) - cost_of(new.site, new.form)
        return replace(choice, form=new.form, cost=choice.cost - less)

    job.plan = replace(job.plan, choices=tuple(entered(choice) for choice in job.plan))
    job.report.sites = job.plan.rows()
