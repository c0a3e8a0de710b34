"""No result differs from what was expected without an error that names the pass; no work is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_nets import to_onnx
from selection import mostly_slow
from torch import Tensor, nn

import tdpass
from tdpass.cli import main
from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.job import Job
from tdpass.models import Model
from tdpass.models.torch.model import TorchModel
from tdpass.pipeline import PASSES, Pass, Pipeline
from tdpass.planner.resampled import resampled
from tdpass.planner.trials import Promise, gap

EVERY_PASS = (
    "fold-batchnorm,smooth,slice-residual{keep=1.0},slice-heads{keep=1.0},project-channels{keep=1.0},divide,"
    "plan,factorize,correct-bias,refit,recalibrate-batchnorm,pivot{measure=false},sparsify,quantize,quantize-activations,"
    "fuse-kernels{measure=false},verify"
)
FAST = {"formats": ["svd", "channel_svd"]}
FRONTENDS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "torch": lambda module, x: module,
    "onnx": to_onnx,
}


def _break_last(model: Model) -> None:
    """Let the last site answer with its bias alone."""
    site = model.sites()[-1]
    shapes = FORMATS.get("svd").shapes(site, (1,))
    model.replace(
        site.name,
        Layer(
            site,
            Form("svd", (1,)),
            {name: torch.zeros(shape) for name, shape in shapes.items()},
            model.bias(site.name),
        ),
    )


def _breaking(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cls = PASSES.get(name)
    original = cls.run

    def run(self: Pass, model: Model, job: Job) -> bool:
        changed = original(self, model, job)
        _break_last(model)
        return changed

    monkeypatch.setattr(cls, "run", run)


def test_the_pipeline_of_these_tests_has_every_pass() -> None:
    assert {step.name for step in Pipeline.parse(EVERY_PASS).passes} == set(PASSES.names())


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    "name", mostly_slow(PASSES.names(), ["fold-batchnorm", "factorize", "refit", "pivot"])
)
def test_a_pass_that_breaks_a_layer_is_named(
    name: str, frontend: str, residual: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FRONTENDS[frontend](residual, images)
    _breaking(monkeypatch, name)
    at_once = rf"^{name}.* the outputs on the calibration data"
    said = f"the pass {name} did most of it" if PASSES.get(name).promise is Promise.NONE else at_once
    with pytest.raises(tdpass.DifferenceError, match=said) as caught:
        tdpass.compress(model, {"params": 0.6}, images, pipeline=EVERY_PASS, **FAST)
    assert isinstance(caught.value.artifact, tdpass.Artifact) == (
        name not in EVERY_PASS.split(",factorize", maxsplit=1)[0].replace("{keep=1.0}", "").split(",")
    )


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_wrong_fold_is_found_without_data_too(
    frontend: str, residual: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FRONTENDS[frontend](residual, images)
    _breaking(monkeypatch, "fold-batchnorm")
    with pytest.raises(tdpass.DifferenceError, match=r"^fold-batchnorm changed the outputs"):
        tdpass.compress(model, {"params": 0.6}, example_inputs=images[:2], **FAST)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_what_is_allowed_becomes_a_note_and_the_checks_say_it(
    frontend: str, residual: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FRONTENDS[frontend](residual, images)
    _breaking(monkeypatch, "fold-batchnorm")
    artifact = tdpass.compress(model, data=images, pipeline="fold-batchnorm,verify", strict=False)
    assert any(note.startswith("fold-batchnorm changed the outputs") for note in artifact.report.notes)
    assert artifact.report.checks == pytest.approx(tdpass.verify(model, artifact.model, images))
    assert artifact.report.checks["relative_difference"] > 0.1


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    ("name", "inputs"), [("residual", "images"), ("encoder", "tokens"), ("odd", "images")]
)
def test_the_report_and_the_verb_say_the_same(
    name: str, inputs: str, frontend: str, request: pytest.FixtureRequest
) -> None:
    module, x = request.getfixturevalue(name), request.getfixturevalue(inputs)
    model = FRONTENDS[frontend](module, x)
    artifact = tdpass.compress(model, {"params": 0.8}, x, **FAST)
    assert artifact.report.checks == pytest.approx(
        tdpass.verify(model, artifact.model, x), rel=1e-6, abs=1e-12
    )
    assert artifact.report.checks["relative_difference"] > 1e-4
    assert not artifact.report.notes


class Folded(nn.Module):
    """A linear layer and a batch-norm over positions, whose channels are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


def test_a_fold_into_the_wrong_axis_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Folded().eval(), torch.randn(20, 8, 6)
    with torch.no_grad():
        module.norm.running_var.uniform_(0.2, 3)

    def folded(model: TorchModel, *_: object) -> list[str]:
        up, norm = model.module.up, model.module.norm
        with torch.no_grad():
            up.weight *= (norm.running_var + norm.eps).rsqrt()[:, None]
            up.bias *= (norm.running_var + norm.eps).rsqrt()
        model.module.norm = nn.Identity()
        return ["up"]

    monkeypatch.setattr(TorchModel, "fold_batchnorm", folded)
    with pytest.raises(tdpass.DifferenceError, match=r"^fold-batchnorm changed the outputs"):
        tdpass.compress(module, data=x, pipeline="fold-batchnorm")


class TimeFirst(nn.Module):
    """Scores of shape [time, samples, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(x))).transpose(0, 1)


@pytest.mark.parametrize(
    "shapes",
    [[(8, 7, 12), (3, 7, 12)], [(1, 7, 12), (1, 4, 12), (1, 9, 12)]],
    ids=["smaller last batch", "lengths"],
)
def test_ragged_outputs_are_compared(shapes: list[tuple[int, ...]]) -> None:
    module = TimeFirst().eval()
    calls = [torch.randn(shape) for shape in shapes]
    artifact = tdpass.compress(module, {"params": 0.7}, calls, formats=["svd"])
    with torch.no_grad():
        outputs = [(module(x), artifact.model(x)) for x in calls]  # type: ignore[operator]
    lost = sum(float((a - b).square().sum()) for a, b in outputs) / sum(
        float(a.square().sum()) for a, _ in outputs
    )
    assert artifact.report.checks["relative_difference"] == pytest.approx(lost**0.5, rel=1e-4)


def test_a_comparison_that_fails_leaves_the_result_and_a_note(
    residual: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crashes(*_: object) -> dict[str, float]:
        raise RuntimeError("sizes of tensors must match")

    monkeypatch.setattr("tdpass.passes.verify.compare_outputs", crashes)
    monkeypatch.setattr("tdpass.planner.trials.Trials.check", crashes)
    artifact = tdpass.compress(residual, {"params": 0.6}, images, **FAST)
    assert not artifact.report.checks
    assert (
        "the outputs could not be compared with the original's: RuntimeError: sizes of tensors must match"
        in artifact.report.notes
    )
    artifact.save(tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").is_file()


def test_a_last_pass_that_crashes_hands_over_what_was_made(residual: nn.Module, images: Tensor) -> None:
    @dataclass(frozen=True)
    class Crashes(Pass):
        name = "crashes"

        def run(self, model: Model, job: Job) -> bool:
            raise ZeroDivisionError

    with pytest.raises(tdpass.PassError, match=r"^crashes failed after plan, factorize") as caught:
        tdpass.compress(residual, {"params": 0.6}, images, pipeline=["plan,factorize", Crashes()], **FAST)
    artifact = caught.value.artifact
    assert isinstance(artifact, tdpass.Artifact)
    assert artifact.report.final.params <= 0.6 * artifact.report.original.params


def test_a_pass_that_fixes_the_number_of_samples_is_named(images: Tensor) -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.rows = nn.Linear(3, 5), -1

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)).reshape(self.rows, 3))

    @dataclass(frozen=True)
    class Freezes(Pass):
        name = "freezes"

        def run(self, model: Model, job: Job) -> bool:
            model.unwrap().rows = 16  # type: ignore[attr-defined]
            return True

    with pytest.raises(
        tdpass.DifferenceError, match=r"^freezes made a network that does not run on 3 samples at a time"
    ):
        tdpass.compress(Free().eval(), data=images, pipeline=[Freezes()])


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_file_that_answers_otherwise_is_set_aside(
    frontend: str, residual: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = tdpass.compress(FRONTENDS[frontend](residual, images), {"params": 0.6}, images, **FAST)
    other = tdpass.compress(FRONTENDS[frontend](residual, images), {"params": 0.5}, images, **FAST)
    path = tmp_path / f"small{artifact.suffix}"
    artifact.save(path)
    monkeypatch.setattr(artifact.opened, "save", other.opened.save)
    with pytest.raises(tdpass.DifferenceError, match="answers otherwise than the model") as caught:
        artifact.save(path)
    assert not path.exists()
    assert str(tmp_path / f"small.unverified{artifact.suffix}") in str(caught.value)


class Plain(nn.Module):
    """Layers without biases, whose inputs have a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(40, 64, bias=False), nn.Linear(64, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(x)))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("measure", ["params", "bytes"])
@pytest.mark.parametrize("share", mostly_slow([0.37, 0.5, 0.61], [0.37]))
def test_no_bias_breaks_the_budget(share: float, measure: str, frontend: str) -> None:
    x = torch.randn(64, 40) + 1
    model = FRONTENDS[frontend](Plain().eval(), x)
    artifact = tdpass.compress(model, {measure: share}, x, formats=["svd"])
    if isinstance(artifact.model, nn.Module):
        stored = [(parameter.numel(), parameter.numel() * 4) for parameter in artifact.model.parameters()]
    else:
        assert isinstance(artifact.model, onnx.ModelProto)
        stored = [
            (array.size, array.nbytes)
            for array in map(onnx.numpy_helper.to_array, artifact.model.graph.initializer)
            if array.ndim
        ]
    held = dict(zip(("params", "bytes"), map(sum, zip(*stored, strict=True)), strict=True))
    dense = {"params": 40 * 64 + 64 * 10, "bytes": 4 * (40 * 64 + 64 * 10)}
    assert held[measure] <= int(share * dense[measure] + 1e-6)
    assert (artifact.report.final.params, artifact.report.final.bytes) == (held["params"], held["bytes"])


def test_a_result_above_its_budget_is_an_error_that_says_by_how_much(
    residual: nn.Module, images: Tensor
) -> None:
    @dataclass(frozen=True)
    class Grows(Pass):
        name = "grows"
        promise = Promise.SAME

        def run(self, model: Model, job: Job) -> bool:
            model.unwrap().extra = nn.Parameter(torch.zeros(5000))  # type: ignore[attr-defined]
            return True

    with pytest.raises(
        tdpass.BudgetError,
        match=r"the result has [\d,]+ params, [\d,]+ above the limit of [\d,]+: "
        r"the passes after the plan added",
    ) as caught:
        tdpass.compress(residual, {"params": 0.6}, images, pipeline=["plan,factorize", Grows()], **FAST)
    assert isinstance(caught.value.artifact, tdpass.Artifact)


def test_resampled_data_has_the_moments_of_the_data_and_its_domain() -> None:
    images = (
        torch.randn(32, 3, 12, 12) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
        + torch.tensor([0.0, 20.0, -1.0])[:, None, None]
    )
    call = tdpass.Batch((images, torch.randint(0, 50, (32, 7))), {"mask": torch.ones(32, 7).tril()})
    noise, tokens, mask = resampled(call, torch.Generator().manual_seed(0)).tensors
    assert not torch.equal(noise, images)
    assert torch.allclose(noise.mean((0, 2, 3)), images.mean((0, 2, 3)), atol=0.3)
    assert torch.allclose(noise.std((0, 2, 3)), images.std((0, 2, 3)), rtol=0.05)
    assert torch.equal(tokens.flatten().sort().values, call.tensors[1].flatten().sort().values)
    assert torch.equal(mask.flatten().sort().values, call.tensors[2].flatten().sort().values)


def test_a_gap_is_seen_in_the_smallest_channel_and_in_every_output() -> None:
    boxes = torch.rand(10, 6) * torch.tensor([320.0] * 5 + [10.0])
    moved = boxes * torch.tensor([1.0] * 5 + [1.1])
    assert gap({"a": boxes}, {"a": moved}) == pytest.approx(0.1, rel=1e-3)
    assert gap([boxes, boxes], [boxes, moved]) == gap(boxes, moved)
    assert gap(boxes, boxes[:5]) == gap(boxes, boxes.clone().fill_(float("nan"))) == float("inf")
    assert gap(boxes, boxes) == 0


def test_the_command_line_keeps_what_was_made_and_fails(
    residual: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    onnx.save(to_onnx(residual, images), tmp_path / "model.onnx")
    np.save(tmp_path / "data.npy", images.numpy())
    _breaking(monkeypatch, "refit")
    words = [
        "compress",
        str(tmp_path / "model.onnx"),
        "--budget",
        "params=0.6",
        "--data",
        str(tmp_path / "data.npy"),
        "-o",
        str(tmp_path / "small.onnx"),
    ]
    words += ["--format", "svd", "--format", "channel_svd"]
    assert main(words) == 1
    assert not (tmp_path / "small.onnx").exists()
    assert {path.name for path in tmp_path.glob("small*")} == {
        f"small.unverified.{kind}" for kind in ("onnx", "plan.json", "report.json", "report.html")
    }
    assert main([*words, "--no-strict"]) == 0
    report = tdpass.Report.load(tmp_path / "small.report.json")
    assert any(note.startswith("refit brought the outputs") for note in report.notes)
    assert report.checks == pytest.approx(
        tdpass.verify(tmp_path / "model.onnx", tmp_path / "small.onnx", images), rel=1e-4
    )
