"""What passes that change how factors are stored have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tdpass.cost import Cost
from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer, check_form, cost_of
from tdpass.job import Job
from tdpass.models.base import Model
from tdpass.pipeline import Pass
from tdpass.planner.candidates import bias_cost
from tdpass.planner.effort import said_of_few
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.planner.repair import divergence_of
from tdpass.planner.rounding import Way
from tdpass.planner.storing import floating, in_format_of, store_layers
from tdpass.planner.trials import Promise
from tdpass.site import Site, selects


@dataclass(frozen=True)
class Stored(Pass, ABC):
    """Store the factors of every site, and the weights of dense ones, in another form than they are in.

    With calibration data and `rounding: moments` columns make up for what those before them lost and the last
    factor of a chain for the others; the plain rounding is kept where the network's output is nearer to the
    original's with it.
    """

    promise = Promise.PLAN

    rounding: Way = "moments"

    @abstractmethod
    def form(self, present: Form, site: Site) -> Form:
        """What becomes of a site that is stored as `present`; the same where it is as it is to be."""

    def left_alone(self, site: Site, form: Form, model: Model, job: Job) -> str:
        """Why a site that could be stored so stays as it is; empty where it does not."""
        return ""

    def run(self, model: Model, job: Job) -> bool:
        return self.store(model, job)

    def store(self, model: Model, job: Job, done: Container[str] = ()) -> bool:
        """Store every site but those that are `done`; whether any changed."""
        layers = _layers(model)
        forms = self._forms(model, layers, job, done)
        if not forms:
            job.note("no site changes")
            return False
        plain = {
            name: in_format_of(floating(layer, partial(model.weight, name)), forms[name])
            if name in forms
            else layer
            for name, layer in layers.items()
        }
        made = {name: plain[name].stored(form) for name, form in forms.items()}
        prepared = job.original.recounted(Cost(model.params(), job.original.macs, model.bytes()))
        if job.batches:
            made = self._nearer(plain, forms, made, model, job)
        for name in forms:
            model.replace(name, made[name])
        job.plan = _restated(
            job.plan or RankPlan((), job.original, prepared=prepared), forms, layers, model, self.name
        )
        job.report.sites = job.plan.rows()
        sites = {site.name: site for site in model.sites()}
        saved = sum(
            cost_of(sites[name], layers[name].form).bytes - cost_of(sites[name], form).bytes
            for name, form in forms.items()
        )
        job.note(
            f"{len(forms)} sites are stored as "
            f"{', '.join(sorted({form.family for form in forms.values()}))}: {saved:,} bytes less"
        )
        return True

    def _forms(
        self, model: Model, layers: Mapping[str, Layer], job: Job, done: Container[str]
    ) -> dict[str, Form]:
        found = {}
        for site in model.sites():
            layer, wanted = layers[site.name], selects(site.name, job.include, job.exclude)
            if not wanted or site.name in done or not layer.factors:
                continue
            own = _own_numbers(model.weight(site.name).dtype)
            present = replace(layer.form, numbers=()) if layer.form.numbers == own else layer.form
            form = self.form(present, site)
            if form.support and not form.numbers:
                form = replace(form, numbers=own)
            if form in (present, layer.form):
                continue
            try:
                check_form(site, form)
            except PlanError as error:
                job.report.decline(site.name, str(error))
                continue
            reason = model.refused(form)
            if reason:
                job.report.decline(site.name, f"it cannot be '{form}': {reason}")
                continue
            reason = self.left_alone(site, form, model, job)
            if reason:
                job.report.decline(site.name, reason)
                continue
            if cost_of(site, form).bytes >= cost_of(site, layer.form).bytes:
                job.report.decline(site.name, f"'{form}' would take no fewer bytes than '{layer.form}'")
                continue
            found[site.name] = form
        return found

    def _nearer(
        self,
        plain: Mapping[str, Layer],
        forms: Mapping[str, Form],
        made: dict[str, Layer],
        model: Model,
        job: Job,
    ) -> dict[str, Layer]:
        """Those of plain rounding and of `rounding` by which the output is nearer to the original's."""
        tapes = job.tapes(model)
        others = {name: layer for name, layer in plain.items() if name not in forms and layer.form != DENSE}
        nearest = divergence_of(tapes, {**others, **made}, job.fitted_divergence)
        if self.rounding != "nearest":
            if few := said_of_few(job.batches, "second moments"):
                job.note(few)
            biased = {name for name, layer in plain.items() if layer.bias is not None}
            changed = {**others, **{name: plain[name] for name in forms}}
            better = store_layers(tapes, changed, forms, biased, self.rounding)
            found = divergence_of(tapes, better, job.fitted_divergence)
            job.note(f"divergence {found:.4g}, rounded one by one {nearest:.4g}")
            if found < nearest:
                nearest, made = found, better
        else:
            job.note(f"divergence {nearest:.4g}")
        job.expected = max(job.expected or 0.0, nearest)
        return made


def _own_numbers(dtype: torch.dtype) -> tuple[str, ...]:
    """The number type of a model's weights, which a support stores what it keeps in.

    None for single precision, in which what a support keeps is stored anyway.
    """
    return () if dtype is torch.float32 else (str(dtype).removeprefix("torch."),)


def _layers(model: Model) -> dict[str, Layer]:
    """Every site's layer, dense ones as such."""
    found = {}
    for site in model.sites():
        layer = model.layer(site.name)
        found[site.name] = (
            Layer(site, DENSE, {"kernel": model.weight(site.name)}, model.bias(site.name))
            if layer is None
            else layer
        )
    return found


def _restated(
    plan: RankPlan, forms: Mapping[str, Form], layers: Mapping[str, Layer], model: Model, by: str
) -> RankPlan:
    """The plan with the forms of these sites, their costs and the plain relative error of their weights."""
    choices = []
    for site in model.sites():
        given, layer = layers[site.name].form, model.layer(site.name)
        cost = cost_of(site, given)
        known = plan.get(site.name) or Choice(
            site.name, site.shape, given, cost, cost, groups=site.groups, given=str(given)
        )
        if site.name in forms and layer is not None:
            error = _error(layer, model.weight(site.name)) if layer.site.shape == site.shape else known.error
            cost = known.cost.recounted(cost_of(site, layer.form) + bias_cost(site, layer.bias))
            known = replace(
                known,
                form=layer.form.left_of(known.form),
                cost=cost,
                error=error,
                reason=f"{known.reason}; {by}".removeprefix("; "),
            )
        choices.append(known)
    return replace(plan, choices=tuple(choices))


def _error(layer: Layer, weight: Tensor) -> float:
    found = FORMATS.get(layer.format).reconstruct(dict(layer.values(torch.float64)), layer.site)
    return float((found - weight.double()).norm()) / (float(weight.double().norm()) or 1.0)
