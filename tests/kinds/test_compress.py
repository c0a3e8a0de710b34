"""Networks of grouped and transposed convolutions, compressed as any other on both front ends."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import onnx
import pytest
import torch
from selection import mostly_slow
from torch import Tensor, nn

import tdpass
from tdpass.models import open_model
from tdpass.models.base import Batch, Model
from tdpass.planner.rank_plan import RankPlan
from tdpass.products import counting


class Decoder(nn.Module):
    """Down by grouped and depthwise convolutions, up by transposed ones, with batch-norms to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, groups=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 5, padding=2, groups=32),
            nn.ReLU(),
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(32, 24, 4, 2, 1, groups=2, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.ConvTranspose2d(24, 12, 3, 2, 1, 1),
            nn.ReLU(),
            nn.Conv2d(12, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    made = Decoder().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    return made


def exported(net: nn.Module, x: Tensor) -> onnx.ModelProto:
    """The network as an ONNX graph."""
    buffer = io.BytesIO()
    torch.onnx.export(
        net,
        (x,),
        buffer,
        dynamo=False,
        dynamic_axes={"input": {0: "n"}},
        input_names=["input"],
        do_constant_folding=False,
    )
    return onnx.load_from_string(buffer.getvalue())


def answer(model: Model, x: Tensor) -> Tensor:
    """Its only output."""
    found = model.run(Batch((x,)))
    return next(iter(found.values())) if isinstance(found, dict) else found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frontend", ["torch", "onnx"])
def test_batchnorms_fold_into_grouped_and_transposed_layers(
    net: nn.Module, images: Tensor, frontend: str
) -> None:
    x = images[:4]
    wanted = net(x).detach()
    model = open_model(net if frontend == "torch" else exported(net, x), Batch((x,)))
    assert sorted(model.fold_batchnorm()) == ["down.2", "up.0"]
    torch.testing.assert_close(answer(model, x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("frontend", "measure"),
    mostly_slow(
        itertools.product(["torch", "onnx"], ["params", "macs"]), [("torch", "macs"), ("onnx", "params")]
    ),
)
def test_a_budget_is_kept_and_what_is_planned_is_what_runs(
    net: nn.Module, images: Tensor, frontend: str, measure: str, tmp_path: Path
) -> None:
    x = images[:4]
    wanted = net(x).detach()
    given = net if frontend == "torch" else exported(net, x)
    artifact = tdpass.compress(given, data=images, budget={measure: 0.6}, cache=False)
    report, plan = artifact.report, artifact.plan
    assert report.final.get(measure) <= 0.6 * report.original.get(measure)
    changed = {choice.site for choice in plan if not choice.kept_dense}
    assert changed & {"down.2", "down.5"}
    assert changed & {"up.0", "up.3"}
    model = open_model(artifact.model, Batch((x,)))
    found = answer(model, x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.6
    plan.save(tmp_path / "plan.json")
    again = RankPlan.load(tmp_path / "plan.json")
    assert again.choices == plan.choices
    repeated = tdpass.compress(given, data=images, plan=again, cache=False)
    torch.testing.assert_close(
        answer(open_model(repeated.model, Batch((x,))), x), found, rtol=1e-4, atol=1e-5
    )
    assert repeated.report.final.get(measure) == report.final.get(measure)
    if frontend == "torch":
        with counting() as counter:
            artifact.model(x[:1])
        assert counter.macs == report.final.macs
        artifact.save(tmp_path / "model.safetensors")
        torch.manual_seed(1)
        loaded = tdpass.load(tmp_path / "model.safetensors", Decoder())
        torch.testing.assert_close(loaded(x), found, rtol=1e-4, atol=1e-5)
