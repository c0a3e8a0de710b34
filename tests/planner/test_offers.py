"""Precision, rank and sparsity in one plan: what is offered and when, and that bytes are as planned."""

from __future__ import annotations

import pytest
import torch
from selection import mostly_slow
from torch import Tensor, nn

import tdpass
from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats.layer import cost_of
from tdpass.models import open_model
from tdpass.planner.offers import EVERYTHING, NOTHING, Offer

PLAIN = "fold-batchnorm,plan{numbers=none},factorize,correct-bias,refit,recalibrate-batchnorm,verify"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    ]
    return nn.Sequential(*layers).eval()


def images() -> Tensor:
    return torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_an_offer_is_every_number_type_with_every_support_of_weights() -> None:
    offer = Offer.parse("int8+int4/32", "2:4")
    assert [str(form) for form in offer.forms(DENSE)] == [
        "dense int8",
        "dense int4/32",
        "dense 2:4",
        "dense int8 2:4",
        "dense int4/32 2:4",
    ]
    assert [str(form) for form in offer.forms(Form("svd", (4,)))] == ["svd 4 int8", "svd 4 int4/32"]
    assert not NOTHING
    assert EVERYTHING
    for numbers, supports in (("int9", ""), ("int8", "half")):
        with pytest.raises(PlanError):
            Offer.parse(numbers, supports)


@pytest.mark.parametrize("share", mostly_slow([0.25, 0.1, 0.05], [0.1]))
def test_a_small_budget_on_bytes_chooses_precision_and_loses_less_than_ranks_alone(share: float) -> None:
    module, x = net(), images()
    artifact = tdpass.compress(module, {"bytes": share}, x, cache=False)
    limit = share * artifact.report.original.bytes
    held = [*artifact.model.parameters(), *artifact.model.buffers()]  # nothing else is a buffer here
    assert (
        artifact.report.final.bytes
        == sum(tensor.nbytes for tensor in held)
        == open_model(artifact.model).bytes()
        <= limit
    )
    assert any(choice.form.numbers for choice in artifact.plan)
    sites = {site.name: site for site in open_model(net()).sites()}
    assert all(
        choice.cost.bytes >= cost_of(sites[choice.site], choice.form).bytes for choice in artifact.plan
    )
    try:
        by_rank = tdpass.compress(module, {"bytes": share}, x, cache=False, pipeline=PLAIN).report.checks[
            "divergence"
        ]
    except tdpass.BudgetError:
        by_rank = float("inf")
    assert artifact.report.checks["divergence"] < 0.9 * by_rank


@pytest.mark.parametrize("pipeline", ["plan", "plan{numbers=none}"])
def test_a_budget_that_plain_factors_cannot_meet_is_met_with_numbers_unless_they_are_refused(
    pipeline: str,
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)
    ).eval()  # rank 1 takes 12 of 36 numbers
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    budget = {"bytes": 0.4}
    if "none" in pipeline:
        with pytest.raises(tdpass.BudgetError, match="smallest reachable plan"):
            tdpass.make_plan(module, budget, x, pipeline=pipeline, cache=False, formats=["svd"])
        return
    artifact = tdpass.make_plan(module, budget, x, pipeline=pipeline, cache=False, formats=["svd"])
    assert any(choice.form.numbers for choice in artifact.plan)
    assert artifact.plan.planned.bytes <= 0.4 * artifact.report.original.bytes


@pytest.mark.parametrize("numbers", ["none", "int8"])
def test_supports_may_be_asked_for(numbers: str) -> None:
    pipeline = f"plan{{numbers={numbers},supports=unstructured/40%}},factorize"
    artifact = tdpass.compress(
        net(),
        {"bytes": 0.5 if numbers == "none" else 0.2},
        images(),
        cache=False,
        pipeline=pipeline,
        formats=["svd"],
    )
    assert any(choice.form.support for choice in artifact.plan)
    assert artifact.report.final.bytes == artifact.plan.planned.bytes


def test_other_budgets_are_planned_as_before() -> None:
    for budget in ({"macs": 0.2}, {"params": 0.2}, {"bytes": 0.6}):
        plan = tdpass.make_plan(net(), budget, images(), cache=False, effort="fast").plan
        assert not any(choice.form.encoded for choice in plan)
