"""Methods as they are made by name alone work, with either optimizer, also in networks with depthwise layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.crossbars import Devices, map_model, simulate
from tdpass.datasets import open_dataset
from tdpass.targets.crossbar import CrossbarArray

OPTIONS: dict[str, dict[str, Any]] = {
    "admm-nn": {"keep": 900, "bits_per_weight": 4},
    "admm-tt": {"budget": {"params": 0.5}},
    "batude": {"budget": {"params": 0.8}},
    "crossbar": {"keep": 1200, "weight_bits": 5},
}
OPTIMIZERS = {"adam": 2e-3, "sgd": 0.02}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    digits = open_dataset("digits")
    settings = {"optimizer": "adam", "lr": 1e-2}
    made = tdpass.train(
        network(), digits.batches(), pretrain=12, control=False, settings=settings, progress=False
    ).model
    assert isinstance(made, nn.Module)
    return made


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_method_converges_as_it_is(name: str, optimizer: str, trained: nn.Module) -> None:
    digits = open_dataset("digits")
    artifact = tdpass.train(
        trained,
        digits.batches(),
        {name: OPTIONS[name]},
        control=False,
        settings={"optimizer": optimizer, "lr": OPTIMIZERS[optimizer]},
        test=digits.accuracy,
        example_inputs=digits.inputs("test")[:2],
        progress=False,
    )
    last = [row for row in artifact.report.training if row.residuals][-1]
    assert max(last.residuals.values()) < 0.1
    assert artifact.report.checks["score_final"] > artifact.report.checks["score_dense"] - 8


def test_depthwise_layers_are_pruned_put_on_levels_and_mapped_too(trained: nn.Module) -> None:
    digits = open_dataset("digits")
    x: Tensor = digits.inputs("test")[:64]
    options = {"array": "forms", "keep": 1000, "weight_bits": 5, "admm": 3, "retrain": 1, "fix": 1}
    artifact = tdpass.train(
        trained,
        digits.batches(),
        {"crossbar": options},
        control=False,
        settings={"optimizer": "adam", "lr": 2e-3},
        example_inputs=x,
        progress=False,
    )
    assert next(choice for choice in artifact.plan if choice.site == "2").form.support.startswith(
        "unstructured/"
    )
    assert isinstance(artifact.model, nn.Module)
    small = artifact.model.eval()
    mapped = map_model(small, CrossbarArray.load("forms"), example_inputs=x)
    assert {matrix.site for matrix in mapped.map.matrices} == {"0", "2", "3", "7"}

    def apart(model: nn.Module) -> float:
        return float((model(x) - small(x)).norm() / small(x).norm())

    with torch.no_grad():
        assert simulate(small, mapped, apart, Devices(converters=False), draws=1).mean < 1e-5
