"""What is held against every random model: full rank changes nothing, and a report says what is so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from frontends import Frontend
from measured import ROUNDING, differences, divergences, off
from nets import Case

import tdpass
from tdpass.cost import Cost
from tdpass.form import Form, Rank
from tdpass.formats.base import FORMATS, offered_formats
from tdpass.formats.layer import dense_cost
from tdpass.models import open_model
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.site import Site

EXACT = [name for name in offered_formats() if FORMATS.get(name).exact_at_full_rank]
BUDGETS: tuple[Mapping[str, float], ...] = (
    {"macs": 0.6},
    {"macs": 0.8},
    {"params": 0.6},
    {"params": 0.8},
    {"bytes": 0.6},
    {"macs": 0.7, "params": 0.8},
    {"bytes": 0.8, "macs": 0.9},
)
SEARCHED: tuple[tuple[str, ...], ...] = (
    (), (), ("svd", "channel_svd"), ("svd", "tucker2"), ("svd", "spatial_svd", "input_svd"),
    ("tensor_train",), ("svd", "cp"), ("svd", "block_term"), ("svd", "tensor_ring"),
)  # fmt: skip
NAMED = re.compile(r"smallest reachable plan \(([\d,]+)")


def at_full_rank(frontend: Frontend, case: Case, rng: Random) -> None:
    """At full rank, or with batch-norms folded alone, the result answers new data as the original does."""
    model = open_model(case.model, case.example)
    choices = [_whole(site, rng) for site in model.sites() if rng.random() < 0.9]
    plan = RankPlan(tuple(choice for choice in choices if choice is not None), Cost())
    steps = (
        "fold-batchnorm,verify"
        if not plan.choices or rng.random() < 0.2
        else "fold-batchnorm,factorize,verify"
    )
    artifact = tdpass.compress(case.model, data=case.data, plan=plan, pipeline=steps, cache=False)
    for call in (*case.calls, *case.fresh):
        ours, theirs = frontend.run(case.model, call), frontend.run(artifact.model, call)
        assert list(ours) == list(theirs)
        worst = max(off(ours[name], theirs[name]) for name in ours)
        assert worst < ROUNDING[case.dtype], (
            f"off by {worst:.3g} at full rank, {[(c.site, c.format, c.rank) for c in plan.choices]}, {steps}"
        )


def at_a_budget(frontend: Frontend, case: Case, rng: Random, folder: Path) -> None:
    """The report, the budget and the saved file hold what independent runs and counts find.

    What is refused can be had as the refusal says.
    """
    bounds, formats, effort = (
        rng.choice(BUDGETS),
        rng.choice(SEARCHED),
        rng.choice(("fast", "fast", "normal")),
    )
    artifact, refusal = _compressed(case, bounds, formats, effort)
    if not open_model(case.model, case.example).sites():
        assert refusal.startswith("no site is left to compress: ")
        return
    if artifact is None:
        bounds = _allowed(bounds, refusal)
        artifact, refusal = _compressed(case, bounds, formats, effort)
    assert artifact is not None, refusal
    _counted(frontend, case, artifact)
    for measure, bound in bounds.items():
        limit = (
            int(bound[:-1])
            if isinstance(bound, str)
            else bound * artifact.report.original.get(measure) + 1e-6
        )
        assert artifact.report.final.get(measure) <= limit, (
            f"{measure} {artifact.report.final.get(measure)} for a bound of {bound}"
        )
    _measured(frontend, case, artifact)
    path = folder / f"small{frontend.suffix}"
    artifact.save(path)
    saved = frontend.loaded(path, case.model)
    for call in case.fresh:
        ours, theirs = frontend.run(artifact.model, call), frontend.run(saved, call)
        assert all(off(ours[name], theirs[name]) < 10 * torch.finfo(case.dtype).eps for name in ours), (
            "what was saved answers otherwise"
        )


def _whole(site: Site, rng: Random) -> Choice | None:
    """The site at full rank in one of the formats that are exact there."""
    able = [name for name in EXACT if FORMATS.get(name).fits(site)]
    if not able:
        return None
    way = FORMATS.get(rng.choice(able))
    rank: Rank = tuple(way.ranks(site)[-1])
    return Choice(site.name, site.shape, Form(way.name, rank), way.cost(site, rank), dense_cost(site))


def _compressed(
    case: Case, bounds: Mapping[str, Any], formats: tuple[str, ...], effort: str
) -> tuple[tdpass.Artifact | None, str]:
    """The result, or why there is none."""
    try:
        return tdpass.compress(
            case.model, dict(bounds), case.data, formats=formats, effort=effort, cache=False
        ), ""
    except (tdpass.BudgetError, tdpass.UsageError) as error:
        return None, str(error)


def _allowed(bounds: Mapping[str, Any], refusal: str) -> dict[str, Any]:
    """The smallest budget that a refusal names; where single ones can be met, the first of them."""
    if refusal.startswith("no plan meets all budgets at once"):
        return dict([next(iter(bounds.items()))])
    measures = {
        measure: NAMED.search(part)
        for measure in bounds
        for part in refusal.split("; ")
        if f" {measure} is below" in part
    }
    (measure, found), *_ = measures.items()
    assert found is not None, refusal
    return {measure: found[1].replace(",", "") + "b"}


def _counted(frontend: Frontend, case: Case, artifact: tdpass.Artifact) -> None:
    samples = artifact.report.checks["samples"]
    for report, model in ((artifact.report.original, case.model), (artifact.report.final, artifact.model)):
        assert (report.params, report.bytes) == frontend.stored(model)
        assert report.macs == round(frontend.macs(model, case.calls) / samples), (
            f"{report.macs} multiply-adds reported"
        )


def _measured(frontend: Frontend, case: Case, artifact: tdpass.Artifact) -> None:
    reference, outputs = (
        [frontend.run(model, call) for call in case.calls] for model in (case.model, artifact.model)
    )
    checks, close = artifact.report.checks, {"rel": 1e-3, "abs": 10 * torch.finfo(case.dtype).eps}
    for name, value in differences(reference, outputs).items():
        assert _near(checks[name], value, close), f"{name} {checks[name]} reported, {value} found"
    measures = _measures(artifact.report.divergence, list(reference[0]))
    found = {
        name: divergences(measure, [c[name] for c in reference], [c[name] for c in outputs])
        for name, measure in measures.items()
    }
    for name, values in found.items():
        said = checks["divergence" if len(found) == 1 else f"divergence[{name}]"]
        assert any(_near(said, value, close) for value in values), (
            f"divergence {said} of {name} ({measures[name]}) reported, {values} found"
        )


def _near(said: float, found: float, close: Mapping[str, float]) -> bool:
    return abs(said - found) <= close["abs"] + close["rel"] * abs(found)


def _measures(text: str, names: list[str]) -> dict[str, str]:
    """The measure of every output, from "mse", or from "mse of a, b; kl of c"."""
    if " of " not in text:
        return dict.fromkeys(names, text)
    parts = [part.partition(" of ") for part in text.split("; ")]
    return {name: measure for measure, _, listed in parts for name in listed.split(", ")}
