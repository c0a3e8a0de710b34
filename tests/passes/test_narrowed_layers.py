"""Channels are projected, what is left is factored and stored in eight bits.

There is one budget and one plan, on both front ends.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn

import tdpass
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.joint.paths import find_paths

PIPELINE = "project-channels{keep=0.75},plan,factorize,correct-bias,refit,verify"
QUIET = {"progress": False, "cache": False, "formats": ["tucker2", "svd"], "effort": "fast"}


class Net(nn.Module):
    """Three convolutions that feed each other, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 32, 3, padding=1)
        self.three, self.out = nn.Conv2d(32, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two, self.three):
            x = torch.relu(layer(x))
        y: Tensor = self.out(x.mean((2, 3)))
        return y


@pytest.fixture
def images() -> Tensor:
    return torch.randn(48, 3, 8, 8)


def _compressed(model: object, x: Tensor, pipeline: str = PIPELINE) -> tdpass.Artifact:
    return tdpass.compress(model, {"macs": 0.45}, x, pipeline=pipeline, strict=False, **QUIET)


def _answers(artifact: tdpass.Artifact, x: Tensor) -> Tensor:
    batch = Batch((x,)) if isinstance(artifact.model, nn.Module) else Batch((), {"x": x})
    answer = artifact.opened.run(batch)
    (value,) = answer.values() if isinstance(answer, dict) else (answer,)
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize("frontend", ["torch", "onnx"])
def test_narrower_layers_are_factored_within_one_budget(
    frontend: str, images: Tensor, tmp_path: Path
) -> None:
    net = Net().eval()
    artifact = _compressed(net if frontend == "torch" else to_onnx(net, images[:2]), images)
    forms = {choice.site: str(choice.form) for choice in artifact.plan}
    assert forms["one"] == "dense out 18"
    assert any(forms[name].startswith("tucker2 ") for name in ("two", "three"))
    assert forms["two"].endswith(" in 18 out 24")
    assert forms["three"].endswith(" in 24 out 18")
    assert forms["out"].endswith(" in 18")
    assert all(choice.shape[:2] == getattr(net, choice.site).weight.shape[:2] for choice in artifact.plan)
    report = artifact.report
    assert report.final.macs <= 0.45 * report.original.macs
    assert artifact.plan.planned.macs == report.final.macs
    if frontend == "torch":
        artifact.save(tmp_path / "small.safetensors")
        loaded = tdpass.load(tmp_path / "small.safetensors", Net())
        assert torch.equal(loaded.eval()(images), artifact.model(images))


@pytest.mark.parametrize("frontend", ["torch", "onnx"])
def test_the_plan_is_carried_out_again_on_both_front_ends(frontend: str, images: Tensor) -> None:
    net = Net().eval()
    first = _compressed(net, images)
    plan = tdpass.RankPlan.from_json(first.plan.to_json())
    model = net if frontend == "torch" else to_onnx(net, images[:2])
    again = tdpass.compress(model, plan=plan, data=images, strict=False, progress=False, cache=False)
    assert {c.site: c.form for c in again.plan} == {c.site: c.form for c in first.plan}
    assert again.report.final.macs == first.report.final.macs
    torch.testing.assert_close(_answers(again, images), _answers(first, images), rtol=1e-3, atol=1e-4)


def test_factors_of_narrower_layers_are_stored_in_eight_bits(images: Tensor, tmp_path: Path) -> None:
    artifact = _compressed(Net().eval(), images, PIPELINE.replace("verify", "quantize,verify"))
    forms = {choice.site: str(choice.form) for choice in artifact.plan}
    assert forms["one"] == "dense out 18 int8"
    assert forms["two"].endswith(" in 18 out 24 int8")
    assert artifact.report.final.bytes < 0.15 * artifact.report.original.bytes
    artifact.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", Net())
    torch.testing.assert_close(loaded.eval()(images), artifact.model(images))


class _Structures(nn.Module):
    """A residual sum, an inverted residual with a depthwise layer and a gate, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        for name, (i, o, groups) in {
            "stem": (3, 8, 1),
            "inner": (8, 12, 1),
            "outer": (12, 8, 1),
            "expand": (8, 16, 1),
            "depthwise": (16, 16, 16),
            "squeeze": (16, 4, 1),
            "excite": (4, 16, 1),
            "project": (16, 8, 1),
            "grow": (8, 4, 1),
            "last": (12, 6, 1),
        }.items():
            setattr(self, name, nn.Conv2d(i, o, 1, groups=groups))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        y = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.project(y)
        z: Tensor = self.last(torch.cat([x, self.grow(x)], 1)).mean((2, 3))
        return z


def test_structures_in_which_channels_stay_are_named_with_the_reason() -> None:
    model = open_model(_Structures().eval(), Batch((torch.randn(2, 3, 4, 4),)))
    tapes = [model.record(Batch((torch.randn(2, 3, 4, 4),)))]
    paths, reasons = find_paths(tapes, {site.name: site for site in model.sites()})
    assert [(path.first, path.second) for path in paths] == [("inner", "outer"), ("squeeze", "excite")]
    assert {name: reason.split(",")[0] for name, reason in reasons.items()} == {
        "stem": "2 calls read its output",
        "outer": "its output enters a sum",
        "expand": "depthwise is grouped",
        "depthwise": "2 calls read its output",
        "excite": "its output goes through mul",
        "project": "its output enters a sum",
        "grow": "its output is concatenated with others",
        "last": "the model returns its output",
    }
