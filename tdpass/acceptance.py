"""Whole models: the compressed one against its budget and, on a target, against the one it was made from."""

from __future__ import annotations

import math
from dataclasses import replace

from tdpass.cost import Cost, amount
from tdpass.errors import BudgetError
from tdpass.form import DENSE
from tdpass.job import Job
from tdpass.measures import MEASURES, counted
from tdpass.models.base import Model, call_batch
from tdpass.planner.prices import deciding
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.targets import Setting


def hold_against_dense(opened: Model, model: Model, job: Job) -> bool:
    """Price both, timed in turn where they are timed, and say in the report what came of it.

    Returns whether the compressed model is cheaper. Where it is not, the plan becomes one that leaves every
    site as it is.  The dense model is the one that was planned on, with its batch-norms folded where they
    were, else the one that came in.
    """
    assert job.target is not None
    assert job.plan is not None
    report, dense = job.report, job.dense or opened
    setting, measures = Setting(job.batch, job.threads), job.target.measures
    before, after = job.target.cost_models(
        [dense, model], lambda: call_batch(dense, job.batches, job.batch), setting
    )
    # the planned and the reached amounts are comparable only on the same scale
    whole = {measure: report.original.get(measure) or before.get(measure) for measure in measures}
    report.original = report.original.replace(**whole)
    first = deciding(job.target, job.budget)[0]
    if after.get(first) < before.get(first):
        report.final = report.final.replace(
            **{measure: _scaled(whole[measure], after, before, measure) for measure in measures}
        )
        return True
    takes = [
        f"{amount(first, cost.get(first))}{'' if first == 'seconds' else f' {first}'}"
        for cost in (after, before)
    ]
    reason = f"the compressed model takes {takes[0]} and the original {takes[1]}: it is given back unchanged"
    report.note(reason)
    report.checks.clear()
    report.final = report.original
    job.plan = _left_dense(job.plan, report.original)
    report.sites = job.plan.rows()
    return False


def _scaled(whole: float, after: Cost, before: Cost, measure: str) -> float:
    """The amount of the whole after, on the scale that the amount before has in the report."""
    if not before.get(measure):
        return after.get(measure)
    value = whole * after.get(measure) / before.get(measure)
    return round(value) if MEASURES.get(measure).whole else value


def hold_to_budget(job: Job) -> None:
    """Raise `BudgetError` unless the counted result is within every bound on what it stores and computes."""
    assert job.plan is not None
    limits = {} if job.budget is None else job.budget.limits(job.original)
    final, planned = job.report.final, job.plan.planned
    over = [measure for measure in counted() if final.get(measure) > limits.get(measure, math.inf)]
    if not over:
        return
    said = ", ".join(
        f"{amount(m, final.get(m))} {m}, {amount(m, final.get(m) - limits[m])} above the limit of "
        f"{amount(m, limits[m])}"
        for m in over
    )
    more = ", ".join(
        f"{amount(m, final.get(m) - planned.get(m))} {m}" for m in over if final.get(m) > planned.get(m)
    )
    why = f"the passes after the plan added {more}" if more else "the plan itself is above it"
    raise BudgetError(
        f"the result has {said}: {why}; lower the budget by that much, or leave out the pass that adds them"
    )


def _left_dense(plan: RankPlan, original: Cost) -> RankPlan:
    choices = tuple(
        choice
        if choice.kept_dense
        else Choice(
            choice.site, choice.shape, DENSE, choice.dense, choice.dense, fingerprint=choice.fingerprint,
            reason=f"{choice.format} here made the whole model slower, or no faster",
            predicted=choice.dense.seconds, groups=choice.groups,
        )
        for choice in plan
    )  # fmt: skip
    return replace(plan, choices=choices, original=original, prepared=None)
