"""Networks of the zoo: each reads what it says, scores the classes asked for, and can be compressed."""

from __future__ import annotations

import pytest
import torch

import tdpass
from tdpass.datasets import open_dataset
from tdpass.zoo import NETS

PARAMETERS = {
    "lenet5": 431_080,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet18": 11_181_642,
    "resnet50": 23_528_522,
}


@pytest.mark.parametrize("name", NETS.names())
def test_networks_read_their_sample_and_score_every_class(name: str) -> None:
    net = NETS.get(name)
    data = open_dataset("digits", net.sample)
    model = net.build(classes=7).eval()
    with torch.inference_mode():
        scores = model(data.inputs("test")[:3])
    assert scores.shape == (3, 7)
    assert bool(torch.isfinite(scores).all())
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in net.build(classes=10).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", [name for name in NETS.names() if name not in ("resnet18", "resnet50", "vgg11", "vgg16")]
)
def test_networks_have_sites_that_a_plan_makes_smaller(name: str) -> None:
    net = NETS.get(name)
    artifact = tdpass.compress(
        net.build().eval(),
        {"params": 0.8},
        formats=["svd", "channel_svd"],
        effort="fast",
        cache=False,
        strict=False,
    )
    assert artifact.report.final.params <= 0.8 * artifact.report.original.params
