"""What every registered pass must keep to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.cost import Budget
from tdpass.models import Model, open_model
from tdpass.models.base import Batch
from tdpass.pipeline import PASSES, Job, Pipeline

BEFORE = {"factorize": "plan", "correct-bias": "plan,factorize", "refit": "plan,factorize", "verify": "plan,factorize"}


def _job(model: Model, x: Tensor) -> Job:
    model.observe(Batch((x,)))
    report = tdpass.Report(original=tdpass.Cost(model.params(), model.macs(), model.bytes()))
    return Job(report, [Batch((x[:24],)), Batch((x[24:],))], budget=Budget.parse({"macs": 0.4}), original=report.original)


def _numbers(model: Model, x: Tensor) -> Tensor:
    output = model.run(Batch((x,)))
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("name", PASSES.names())
def test_it_says_honestly_whether_it_changed_the_model(name: str, residual: nn.Module, images: Tensor) -> None:
    model = open_model(residual).clone()
    job = _job(model, images)
    Pipeline.parse(BEFORE.get(name, [])).run(model, job)
    before = ({key: value.clone() for key, value in model.unwrap().state_dict().items()}, _numbers(model, images))  # type: ignore[attr-defined]
    changed = PASSES.get(name)().run(model, job)
    after = model.unwrap().state_dict()  # type: ignore[attr-defined]
    same = before[0].keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before[0].items())
    assert changed != same
    assert bool(torch.isfinite(_numbers(model, images)).all())
    model.check()


@pytest.mark.parametrize("name", PASSES.names())
def test_a_second_run_leaves_the_output_as_it_is(name: str, residual: nn.Module, images: Tensor) -> None:
    model = open_model(residual).clone()
    job = _job(model, images)
    Pipeline.parse(BEFORE.get(name, [])).run(model, job)
    step = PASSES.get(name)()
    step.run(model, job)
    once = _numbers(model, images)
    step.run(model, job)
    assert torch.allclose(_numbers(model, images), once, atol=1e-2 * float(once.abs().max()))


@pytest.mark.parametrize("name", PASSES.names())
def test_without_data_it_runs_or_says_what_is_missing(name: str, residual: nn.Module) -> None:
    model = open_model(residual).clone()
    job = Job(tdpass.Report(), budget=Budget.parse({"params": 0.5}), original=tdpass.Cost(model.params(), 0, model.bytes()))
    try:
        PASSES.get(name)().run(model, job)
    except tdpass.TdpassError as error:
        assert len(str(error)) > 20  # noqa: PT017 - the message is the point
    model.check()


def test_folding_and_repairs_do_what_they_promise(residual: nn.Module, images: Tensor) -> None:
    model = open_model(residual).clone()
    job = _job(model, images)
    dense = _numbers(model, images)
    Pipeline.parse("fold-batchnorm").run(model, job)
    assert torch.allclose(_numbers(model, images), dense, atol=1e-4)
    divergences = []
    for text in ("plan,factorize", "correct-bias", "refit"):
        Pipeline.parse(text).run(model, job)
        divergence = job.measure
        divergences.append(divergence.mean([(divergence.outputs(dense), divergence.outputs(model.run(Batch((images,)))))]))
    assert divergences == sorted(divergences, reverse=True)
