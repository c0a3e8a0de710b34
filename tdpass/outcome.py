"""What the passes leave: counted again, held to the budget, and made an artifact."""

from __future__ import annotations

import torch

from tdpass.acceptance import hold_against_dense, hold_to_budget
from tdpass.artifact import Artifact, Reload
from tdpass.cost import Cost
from tdpass.errors import TdpassError
from tdpass.formats.layer import Layer
from tdpass.job import Job
from tdpass.models import Model
from tdpass.models.torch.saving.pretrained import mark_pretrained
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report


def finished(opened: Model, model: Model, job: Job) -> Artifact:
    """What comes out of the passes, counted again and held to the budget.

    On a target it is held against the dense model too.
    """
    report = job.report
    if job.plan is None:
        job.plan = RankPlan((), report.original, declined=dict(report.declined))
    given = {site.name: opened.layer(site.name) for site in opened.sites()}
    changed = job.smaller or any(
        _differ(model.layer(site.name), given.get(site.name)) for site in model.sites()
    )
    _count_again(model, job, job.plan, changed=changed)
    if not report.dry_run:
        hold_to_budget(job)
    if job.target is not None:
        report.target = (
            f"{job.target.name}, batch {job.batch}, {job.threads} "
            f"{'thread' if job.threads == 1 else 'threads'}"
        )
        if changed and not hold_against_dense(opened, model, job):
            model = opened.clone()
    return _artifact(model, job, job.plan)


def _differ(layer: Layer | None, given: Layer | None) -> bool:
    if layer is None or given is None:
        return layer is not given
    return layer.form != given.form or any(
        not torch.equal(factor, given.factors[name]) for name, factor in layer.factors.items()
    )


def _count_again(model: Model, job: Job, plan: RankPlan, *, changed: bool) -> None:
    report = job.report
    report.dry_run = not changed and any(not choice.kept for choice in plan)
    report.final = (
        plan.planned
        if report.dry_run
        else report.original.recounted(Cost(model.params(), _macs(model, report), model.bytes()))
    )


def _artifact(model: Model, job: Job, plan: RankPlan) -> Artifact:
    trial = next(iter(job.trials.trials), None) if job.trials is not None else None
    mark_pretrained(made := model.unwrap())
    return Artifact(
        made,
        plan,
        job.report,
        model,
        None if trial is None or job.given is None else Reload(trial.call, job.given.reader()),
    )


def salvaged(model: Model, job: Job) -> Artifact | None:
    """What was made before an error was found, where the plan was carried out.

    Not to be trusted before the error is understood.
    """
    planned = [choice.site for choice in job.plan or () if not choice.kept_dense]
    names = {site.name for site in model.sites()}
    if (
        job.plan is None
        or not planned
        or not all(name in names and model.layer(name) is not None for name in planned)
    ):
        return None
    try:
        _count_again(model, job, job.plan, changed=True)
        return _artifact(model, job, job.plan)
    except TdpassError:
        return None


def _macs(model: Model, report: Report) -> int:
    """Multiply-adds per sample of the result, counted anew.

    Says in the report what the count has no view of.
    """
    counted = model.count()
    for name in counted.unseen:
        report.note(f"the multiply-adds of {name} are not counted: what it computes cannot be seen")
    return counted.per_sample
