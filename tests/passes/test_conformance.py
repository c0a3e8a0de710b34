"""What every registered pass must keep to, on both front ends."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn

import tdpass
from tdpass.cost import Budget
from tdpass.errors import PlanError
from tdpass.job import Job
from tdpass.models import Model, open_model
from tdpass.models.base import Batch
from tdpass.pipeline import PASSES, Pipeline

FRONT_ENDS = ("torch", "onnx")
BEFORE = {
    "factorize": "plan",
    "correct-bias": "plan,factorize",
    "refit": "plan,factorize",
    "verify": "plan,factorize",
}
# What a second run may improve on; all others leave the output as it is.
REPAIRS = ("correct-bias", "refit")
WITHOUT_DATA = ("quantize", "sparsify")  # they need none to round, or to keep what is largest
FORMATS_TRIED = ("svd", "channel_svd", "spatial_svd", "tucker2")  # those that need no search


@pytest.fixture(scope="module")
def exported() -> dict[str, onnx.ModelProto]:
    """The network of every test in this file, exported once."""
    return {}


@pytest.fixture(params=FRONT_ENDS)
def model(
    request: pytest.FixtureRequest, residual: nn.Module, images: Tensor, exported: dict[str, onnx.ModelProto]
) -> Model:
    if request.param == "torch":
        return open_model(residual).clone()
    if not exported:
        exported["residual"] = to_onnx(residual, images[:2])
    return open_model(exported["residual"]).clone()


def _job(model: Model, x: Tensor) -> Job:
    batch = _batch(model, x)
    model.observe(batch)
    report = tdpass.Report(original=tdpass.Cost(model.params(), model.macs(), model.bytes()))
    batches = [_batch(model, x[:24]), _batch(model, x[24:])]
    return Job(
        report,
        batches,
        budget=Budget.parse({"macs": 0.4}),
        formats=FORMATS_TRIED,
        original=report.original,
        given=model.clone(),
    )


def _batch(model: Model, x: Tensor) -> Batch:
    return Batch((x,)) if model.frontend == "torch" else Batch((), {"x": x})


def _numbers(model: Model, x: Tensor) -> Tensor:
    output = model.run(_batch(model, x))
    (value,) = output.values() if isinstance(output, dict) else (output,)
    assert isinstance(value, Tensor)
    return value


def _stored(model: Model) -> dict[str, Tensor]:
    """Every number that the model holds, with what replaced what."""
    stored = {f"weight {site.name}": model.weight(site.name).clone() for site in model.sites()}
    for site in model.sites():
        bias, layer = model.bias(site.name), model.layer(site.name)
        stored |= {} if bias is None else {f"bias {site.name}": bias.clone()}
        stored |= (
            {}
            if layer is None
            else {
                f"{layer.format} {site.name} {name}": factor.clone() for name, factor in layer.factors.items()
            }
        )
        stored |= {} if layer is None or layer.bias is None else {f"new bias {site.name}": layer.bias.clone()}
    return stored


def _divergence(job: Job, model: Model) -> float:
    divergence = job.fitted_divergence
    return divergence.mean(
        [
            (reference, divergence.outputs(model.run(batch)))
            for reference, batch in zip(job.references, job.batches, strict=True)
        ]
    )


@pytest.mark.parametrize("name", PASSES.names())
def test_it_says_honestly_whether_it_changed_the_model(name: str, model: Model, images: Tensor) -> None:
    job = _job(model, images)
    Pipeline.parse(BEFORE.get(name, [])).run(model, job)
    before = (_stored(model), _numbers(model, images))
    changed = PASSES.get(name)().run(model, job)
    after = (_stored(model), _numbers(model, images))
    same = before[0].keys() == after[0].keys() and all(
        torch.equal(value, after[0][key]) for key, value in before[0].items()
    )
    assert changed or same
    assert changed or torch.equal(before[1], after[1])
    assert bool(torch.isfinite(after[1]).all())
    model.check()


@pytest.mark.parametrize("name", PASSES.names())
def test_a_second_run_leaves_the_output_as_it_is_or_repairs_more(
    name: str, model: Model, images: Tensor
) -> None:
    job = _job(model, images)
    Pipeline.parse(BEFORE.get(name, [])).run(model, job)
    step = PASSES.get(name)()
    step.run(model, job)
    once, before = _numbers(model, images), _divergence(job, model)
    step.run(model, job)
    if name in REPAIRS:
        assert _divergence(job, model) <= before * (1 + 1e-4)
    else:
        assert torch.allclose(_numbers(model, images), once, rtol=1e-5, atol=1e-6 * float(once.abs().max()))


@pytest.mark.parametrize("name", PASSES.names())
def test_without_data_it_runs_or_names_what_is_missing(name: str, model: Model) -> None:
    original = tdpass.Cost(model.params(), 0, model.bytes())
    job = Job(
        tdpass.Report(),
        budget=Budget.parse({"params": 0.5}),
        formats=FORMATS_TRIED,
        original=original,
        given=model.clone(),
    )
    if name == "factorize":
        with pytest.raises(
            PlanError, match="factorize has no plan to carry out; put the pass 'plan' before it"
        ):
            PASSES.get(name)().run(model, job)
    else:
        assert PASSES.get(name)().run(model, job) == (name in WITHOUT_DATA)
    model.check()


def test_folding_and_repairs_do_what_they_promise(model: Model, images: Tensor) -> None:
    job = _job(model, images)
    dense = _numbers(model, images)
    Pipeline.parse("fold-batchnorm").run(model, job)
    assert torch.allclose(_numbers(model, images), dense, atol=1e-4)
    divergences = []
    for text in ("plan,factorize", "correct-bias", "refit"):
        Pipeline.parse(text).run(model, job)
        divergences.append(_divergence(job, model))
    assert divergences == sorted(divergences, reverse=True)
