"""LC: ranks follow their price while training, and what comes out is what the last projection chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tdpass
from tdpass.errors import UsageError
from tdpass.methods import Lc
from tdpass.training.batches import Batches


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )


def batches() -> Batches:
    labels = torch.arange(64) % 2
    generator = torch.Generator().manual_seed(1)
    return Batches(torch.randn(64, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1), labels, 16)


def train(**options: Any) -> tdpass.Artifact:
    settings = {"lr": 0.05, "schedule": 1.0}
    return tdpass.train(
        network(), batches(), {"lc": {"rounds": 4, **options}}, settings=settings, control=False
    )


def test_a_higher_penalty_leaves_smaller_ranks() -> None:
    sizes = [train(penalty=penalty, rho=0.5).report.final.params for penalty in (0.01, 3.0, 30.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == sum(parameter.numel() for parameter in network().parameters())
    assert sizes[-1] < 0.3 * sizes[0]


def test_the_weights_end_at_the_ranks_that_were_chosen() -> None:
    artifact = train(penalty=10.0, rho={"geometric": {"start": 0.5, "end": 20.0}}, rounds=12, decoupled=True)
    factored = [choice for choice in artifact.plan if not choice.kept_dense]
    assert factored
    assert max(choice.error for choice in factored) < 0.05


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "no price"),
        ({"penalty": -1.0}, "penalty"),
        ({"penalty": 1.0, "format": "tucker2"}, "format"),
        ({"penalty": 1.0, "rho": -1.0}, "rho"),
    ],
)
def test_options_are_checked(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Lc(**wrong)
