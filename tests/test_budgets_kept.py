"""The result, counted anew, is within every bound.

What passes add is in the price of what they are chosen for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from selection import mostly_slow
from torch import Tensor, nn

import tdpass
from tdpass.artifact import load_plan

DATA = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(24, 4, 10, 10, generator=torch.Generator().manual_seed(1))


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 48, bias=False),
        nn.ReLU(),
        nn.Linear(48, 8, bias=False),
    )


def _normed(affine: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((4, 24), (24, 24)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs, affine=affine),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 64, bias=False))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "no biases": (_plain, DATA),
    "batch-norms": (lambda: _normed(True), IMAGES),
    "batch-norms without weights": (lambda: _normed(False), IMAGES),
}


def _onnx(model: nn.Module, x: Tensor, path: Path) -> onnx.ModelProto:
    torch.onnx.export(
        model, (x[:2],), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    return onnx.load(path)


def _stored(model: object) -> int:
    if isinstance(model, nn.Module):
        return sum(parameter.numel() for parameter in model.parameters())
    assert isinstance(model, onnx.ModelProto)
    statistics = {
        name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]
    }
    sizes = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims and tensor.name not in statistics
    ]
    return sum(torch.Size(tensor.dims).numel() for tensor in sizes)


@pytest.mark.parametrize("frontend", ["torch", "onnx"])
@pytest.mark.parametrize("measure", ["params", "bytes"])
@pytest.mark.parametrize("name", mostly_slow(NETS, ["no biases"]))
def test_biases_that_are_added_are_within_the_budget(
    name: str, measure: str, frontend: str, tmp_path: Path
) -> None:
    make, data = NETS[name]
    torch.manual_seed(0)
    model: object = make().eval()
    if frontend == "onnx":
        assert isinstance(model, nn.Module)
        model = _onnx(model, data, tmp_path / "model.onnx")
    for share in (0.5, 0.7):
        result = tdpass.compress(
            model, {measure: share}, data, cache=False, formats=["svd", "channel_svd", "tucker2"]
        )
        before, after = result.report.original, result.report.final
        assert after.get(measure) <= share * before.get(measure)
        assert after.params == _stored(result.model)
        assert result.plan.planned.params == after.params
        assert result.plan.planned.bytes == after.bytes
        result.plan.save(tmp_path / "plan.json")
        assert load_plan(tmp_path / "plan.json") == result.plan


def test_a_dry_run_says_what_comes_out() -> None:
    torch.manual_seed(0)
    model = _normed(False).eval()
    planned = tdpass.make_plan(model, {"params": 0.6}, IMAGES, cache=False).report.final
    assert planned == tdpass.compress(model, {"params": 0.6}, IMAGES, cache=False).report.final
