"""pivot: factors without what they hold twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdpass.cost import amount
from tdpass.errors import NumericalError
from tdpass.form import DENSE
from tdpass.formats.layer import Layer, cost_of
from tdpass.formats.pivoted import LEAD, PIVOT, led, spared_formats
from tdpass.job import Job
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.joint.paths import find_paths
from tdpass.planner.rank_plan import Choice
from tdpass.planner.trials import Promise
from tdpass.site import Site
from tdpass.targets import Target, open_target
from tdpass.targets.base import Setting


@register_pass
@dataclass(frozen=True)
class Pivot(Pass):
    """Spare r^2 numbers and multiply-adds of every axis of r that two factors share.

    The output stays what it was, to rounding. A layer stays the chain that it is where that costs less, by
    what the job's target says, else as timed here; with `measure` false all change that can.  Where one other
    layer alone reads what a layer makes, that takes its inputs in the order which leads with the pivots, and
    no order is stored.  Meant for the end of a pipeline, before anything that stores factors in other number
    types: repairs and training work on plain chains.
    """

    name = "pivot"
    promise = Promise.SAME

    measure: bool = True

    def run(self, model: Model, job: Job) -> bool:
        sites = {site.name: site for site in model.sites()}
        before = {name: layer for name in sites if (layer := model.layer(name)) is not None}
        if not before:
            job.note("skipped: no layer is factored; put factorize before it")
            return False
        target = (job.target or open_target("cpu", model.frontend, job.cache)) if self.measure else None
        tapes = job.tapes(model)
        paths = {path.first: path for path in find_paths(tapes, sites)[0]} if tapes else {}
        now = dict(before)
        for name, layer in before.items():
            path = paths.get(name)
            after = None if path is None else now.get(path.second) or _dense(model, sites[path.second])
            ways = _ways(now[name], job, after, 1 if path is None else path.spread)
            forms = [layer, *(way[0] for way in ways)]
            best = (
                _cheapest(sites[name], forms, target, job)
                if target is not None and sites[name].seen
                else min(1, len(ways))
            )
            if best:
                now[name], other = ways[best - 1]
                now |= {path.second: other} if path is not None and other is not None else {}
        changed = {name: layer for name, layer in now.items() if layer is not before.get(name)}
        for name, layer in changed.items():
            model.replace(name, layer)
        pivoted = {
            name: layer
            for name, layer in changed.items()
            if name in before and layer.form != before[name].form
        }
        fewer = sum(_params(before[name]) - _params(layer) for name, layer in pivoted.items())
        job.note(f"{len(pivoted)} of {len(before)} factored layers changed, {fewer:,} numbers fewer")
        _enter(pivoted, before, job)
        return bool(changed)


Way = tuple[Layer, "Layer | None"]


def _dense(model: Model, site: Site) -> Layer:
    return Layer(site, DENSE, {"kernel": model.weight(site.name)}, model.bias(site.name))


def _ways(layer: Layer, job: Job, after: Layer | None, spread: int) -> list[Way]:
    """The layer in every format that spares what it holds twice, and the one behind it where that changes.

    Those that need no order of channels come first: the layer behind takes its inputs in the order that leads
    with the pivots, or the leading channels make good pivots as they are.
    """
    if layer.form.encoded:
        job.report.decline(
            layer.site.name, f"not pivoted: its factors are stored as '{layer.form}'; pivot before that"
        )
        return []
    found: list[Way] = []
    reasons = []
    for name in spared_formats(layer.format, layer.site, layer.rank):
        try:
            found.append((layer.converted(name), None))
        except NumericalError as error:
            reasons.append(str(error))
    if reasons and not found and after is None:
        job.report.decline(layer.site.name, f"not pivoted: {reasons[0]}")
    ordered = [layer, *(way[0] for way in found)][-1]
    if (
        after is not None
        and not any(way[0].format.endswith(LEAD) for way in found)
        and ordered.format.endswith(PIVOT)
    ):
        both = led(ordered, after, spread)
        found = [*([both] if both is not None else []), *found]
    return found


def _cheapest(site: Site, layers: Sequence[Layer], target: Target, job: Job) -> int:
    """The place of the one that costs least on the target.

    Says why one stays as it is where there was a choice.
    """
    if len(layers) < 2:
        return 0
    measure = target.measures[0]
    costs = [
        cost.get(measure)
        for cost in target.cost(
            site, [layer.form for layer in layers], Setting(job.batch, job.threads, layers[0].dtype)
        )
    ]
    best = min(range(len(layers)), key=costs.__getitem__)
    if best == 0:
        written = [amount(measure, cost) for cost in (costs[0], min(costs[1:]))]
        job.report.decline(
            site.name,
            f"not pivoted: {written[0]} as '{layers[0].form}', {written[1]} without what it holds twice",
        )
    return best


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
