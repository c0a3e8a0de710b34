"""factorize: carry out the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from tdpass.cost import Cost
from tdpass.digest import digest
from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, Factors
from tdpass.formats.layer import check_form, cost_of, dense_cost
from tdpass.formats.metric import Metric
from tdpass.job import Job
from tdpass.models.abilities import DividesLayers
from tdpass.models.base import Model, few_samples
from tdpass.models.streams import HeadChange
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.candidates import SiteFits, bias_cost
from tdpass.planner.joint import Together, carries, joint_layers, put
from tdpass.planner.moments import stream_metrics
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.planner.trials import Promise
from tdpass.site import Site


@register_pass
@dataclass(frozen=True)
class Factorize(Pass):
    """Replace every planned site by its factors, fitted in the metric of the calibration data if any."""

    name = "factorize"
    promise = Promise.PLAN

    def run(self, model: Model, job: Job) -> bool:
        if job.plan is None:
            raise PlanError(
                "factorize has no plan to carry out; put the pass 'plan' before it, or pass plan="
            )
        _divided_as_planned(job.plan, model)
        job.plan = match_names(job.plan, model, job.settled)
        done = job.carried_out(model)
        prepared = job.prepared(model) - sum((choice.cost - choice.dense for choice in done), Cost())
        sites = {site.name: site for site in model.sites()}
        prepared -= _narrowed(job.plan, done, sites, job.settled)
        present = {name: _present(name, model) for name in sites}
        chosen = {
            choice.site: choice
            for choice in job.plan
            if choice.form != present.get(choice.site, DENSE) and choice not in done
        }
        for choice in chosen.values():
            FORMATS.get(choice.format)
        replaced: set[str] = set()
        heads: dict[str, HeadChange] = {}
        for found in self._joint(chosen, sites, model, job):
            put(model, found.layers, found.heads)
            replaced.update(found.layers)
            heads |= found.heads
        inside = {name for name, choice in chosen.items() if choice.joint and choice.form.factored}
        if heads or inside - set(job.settled):
            job.settle(model)
            sites = {site.name: site for site in model.sites()}
        alone = [
            sites[name]
            for name, choice in chosen.items()
            if not choice.joint or (name in inside and name in job.settled)
        ]
        tapes = job.tapes(model) if job.batches else []
        for site in alone:
            check_form(site, chosen[site.name].form)
        _check_start(job.start, {site.name: site for site in alone}, chosen)
        metrics = (
            stream_metrics(tapes, alone, job.fitted_divergence)
            if tapes
            else ((site, Metric()) for site in alone)
        )
        for count, (site, metric) in enumerate(metrics, start=1):
            choice = chosen[site.name]
            fits = SiteFits(
                site, model.weight(site.name), model.bias(site.name), metric, job.start.get(site.name)
            )
            model.replace(site.name, fits.layer(choice.form))
            replaced.add(site.name)
            job.progress("factorizing", count, len(alone))
        left = set(chosen) - replaced
        if left:
            change = chosen[min(left)].joint
            raise PlanError(
                f"site {min(left)!r} is planned as part of '{change}' with other sites, but this model "
                "lacks such a group; plan for this model"
            )
        job.plan = replace(
            job.plan,
            choices=tuple(_priced(choice, sites, present, model, job.settled) for choice in job.plan),
            original=job.original,
            prepared=prepared,
        )
        job.report.sites = job.plan.rows()
        if isinstance(model, DividesLayers):
            model.join()
        job.note(f"replaced {len(replaced)} sites")
        job.note_recurrent(model)
        return bool(replaced)

    def _joint(
        self, chosen: dict[str, Choice], sites: dict[str, Site], model: Model, job: Job
    ) -> Iterator[Together]:
        """What sites become that change together."""
        together = {
            name: choice for name, choice in chosen.items() if choice.joint and name not in job.settled
        }
        if not together:
            return
        tapes = job.tapes(model)
        if not tapes:
            raise PlanError(
                "the plan changes several sites together, which needs to see the model running; pass data= "
                "or example_inputs="
            )
        able = partial(carries, model.clone(), few_samples(model, job.batches))
        yield from joint_layers(together, sites, model.weight, model.bias, tapes, job.fitted_divergence, able)


def _present(name: str, model: Model) -> Form:
    """A site's form; with fewer channels it counts as dense, as its neighbours were planned with it."""
    layer = model.layer(name)
    return DENSE if layer is None or layer.form.narrow else layer.form


def _divided_as_planned(plan: RankPlan, model: Model) -> None:
    """Divide the model's layers where the plan changes sites that it has not.

    They are found by name or by the content of the weight.
    """
    names = {site.name for site in model.sites()}
    missing = {choice.fingerprint for choice in plan if not choice.kept_dense and choice.site not in names}
    if missing and isinstance(model, DividesLayers):
        prints = {digest(model.weight(name)) for name in names}
        if not missing <= prints:
            model.divide()


def _check_start(
    start: Mapping[str, Factors], sites: Mapping[str, Site], chosen: Mapping[str, Choice]
) -> None:
    for name, factors in start.items():
        choice = chosen.get(name)
        wanted = (
            {}
            if choice is None or name not in sites
            else FORMATS.get(choice.format).shapes(sites[name], choice.rank)
        )
        if {key: tuple(factor.shape) for key, factor in factors.items()} != wanted:
            given = ", ".join(f"{key} {tuple(factor.shape)}" for key, factor in factors.items())
            raise PlanError(
                f"start has factors {given or 'of no name'} for site {name!r}, the plan has "
                f"{wanted or 'none'}; give those of the same plan"
            )


def _narrowed(
    plan: RankPlan, done: Sequence[Choice], sites: Mapping[str, Site], settled: Mapping[str, Form]
) -> Cost:
    """What sites cost with fewer channels, over what they did with all.

    Counted are those whose layers go on to be factored.
    """
    inside = [choice for choice in plan if choice.site in settled and choice not in done]
    return sum((dense_cost(sites[choice.site]) - choice.dense for choice in inside), Cost())


def _priced(
    choice: Choice,
    sites: Mapping[str, Site],
    present: Mapping[str, Form],
    model: Model,
    settled: Mapping[str, Form],
) -> Choice:
    """The choice with the costs it has in this model.

    Another input size, or none, may have hidden them from who planned.
    """
    if choice.site not in sites:
        return choice
    site, layer, given = sites[choice.site], model.layer(choice.site), present[choice.site]
    if choice.site in settled and not choice.form.factored:
        return choice
    if choice.site in settled:
        cost = cost_of(site, choice.form) + bias_cost(
            site, model.bias(site.name) if layer is None else layer.bias
        )
        return replace(choice, cost=choice.cost.recounted(cost))
    dense = choice.dense.recounted(cost_of(site, given))
    if layer is None or choice.form == given:
        return replace(choice, cost=dense, dense=dense, given=str(given))
    cost = cost_of(site, choice.form) + bias_cost(site, layer.bias)
    return replace(choice, cost=choice.cost.recounted(cost), dense=dense, given=str(given))


def match_names(plan: RankPlan, model: Model, settled: Mapping[str, Form] = MappingProxyType({})) -> RankPlan:
    """The plan with its sites named as in this model: by name, else by the content of the weight.

    Raises `PlanError` when a site that the plan changes has no counterpart of the same shape; those that are
    `settled` have fewer channels already.
    """
    sites = {site.name: site for site in model.sites()}
    names: dict[str, str] = {}
    unmatched = [choice for choice in plan if choice.site not in sites]
    prints = {digest(model.weight(name)): name for name in sites} if unmatched else {}
    for choice in unmatched:
        if choice.fingerprint in prints:
            names[choice.site] = prints[choice.fingerprint]
        elif not choice.kept_dense:
            raise PlanError(
                f"the plan changes site {choice.site!r}, which this model does not have; its sites: "
                f"{_some(list(sites))}"
            )
    renamed = plan.renamed(names)
    for choice in renamed:
        if choice.site in settled:
            continue
        if choice.site in sites and sites[choice.site].shape != choice.shape:
            raise PlanError(
                f"the plan expects site {choice.site!r} of shape {choice.shape}, the model has "
                f"{sites[choice.site].shape}; plan for this model"
            )
    return renamed


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
