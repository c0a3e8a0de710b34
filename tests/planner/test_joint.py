"""Options that cover several sites."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.divergence import Divergence
from tdpass.planner.joint import joint_options
from tdpass.planner.sensitivity import Sweep


def test_a_plan_that_takes_an_option_counts_its_loss(residual: nn.Module, images: Tensor) -> None:
    model = open_model(residual, Batch((images,)))
    tapes = [model.record(Batch((images,)))]
    divergence = Divergence()
    fitted = divergence.fit([divergence.outputs(tape.play().finish()) for tape in tapes])
    sites = {site.name: site for site in model.sites()}
    options = joint_options(sites, model.weight, model.bias, tapes, Sweep(tapes, fitted, 64), lambda what, done, of: None)
    assert any(len(option.parts) == 2 for option in options)
    for option in options:
        assert option.loss > 0
        assert sum(part.loss for part in option.parts.values()) == pytest.approx(option.loss)
