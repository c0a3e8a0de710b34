"""Streamed moments against direct sums."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tdpass.kinds import kind_of
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner import moments
from tdpass.planner.divergence import Divergence, FittedDivergence
from tdpass.tape import Tape


def _fitted(tapes: Sequence[Tape]) -> FittedDivergence:
    wish = Divergence()
    return wish.fit([wish.outputs(tape.play().finish()) for tape in tapes])


def test_covariance_and_mean_of_a_layer(residual: nn.Module, images: Tensor) -> None:
    model = open_model(residual)
    tapes = [model.record(Batch((images[:24],))), model.record(Batch((images[24:],)))]
    (site,) = (site for site in model.sites() if site.name == "stem")
    ((_, metric),) = moments.stream_metrics(tapes, [site], _fitted(tapes))
    rows = kind_of(site).rows(images, site).double()
    covariance = torch.cov(rows.T, correction=0)
    covariance.diagonal().add_(moments.INPUT_DAMPING * covariance.diagonal().mean())
    assert metric.inputs is not None
    assert metric.mean is not None
    assert metric.outputs is not None
    assert torch.allclose(metric.inputs, covariance, atol=1e-5)
    assert torch.allclose(metric.mean, rows.mean(0), atol=1e-6)
    assert torch.linalg.eigvalsh(metric.outputs)[0] > 0


def test_wide_layers_are_streamed_in_groups_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, residual: nn.Module, images: Tensor
) -> None:
    model = open_model(residual)
    tapes = [model.record(Batch((images,)))]
    together = dict(moments.stream_metrics(tapes, model.sites(), _fitted(tapes)))
    monkeypatch.setattr(moments, "MEMORY_LIMIT", 100_000)
    monkeypatch.setattr(moments, "FULL_LIMIT", 100)
    apart = dict(moments.stream_metrics(tapes, model.sites(), _fitted(tapes)))
    for site, metric in together.items():
        assert metric.inputs is not None
        assert apart[site].inputs is not None
        wide = site.weights // site.o > 100
        expected = metric.inputs.diagonal() if wide else metric.inputs
        assert torch.allclose(apart[site].inputs, expected, rtol=1e-3)  # type: ignore[arg-type]
