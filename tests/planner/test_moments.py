"""Streamed moments against direct sums."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner import moments
from tdpass.planner.divergence import Divergence, FittedDivergence
from tdpass.planner.patches import output_rows, patches
from tdpass.site import Site
from tdpass.tape import Tape


@pytest.mark.parametrize(
    "site",
    [
        Site("l", "linear", (5, 4)),
        Site("a", "conv", (5, 4, 3), (2,), ((1, 0),), (1,)),
        Site("b", "conv", (5, 4, 3, 2), (1, 2), ((1, 1), (0, 2)), (2, 1)),
        Site("c", "conv", (5, 4, 2, 1, 3), (1, 1, 1), ((0, 1), (0, 0), (1, 1)), (1, 1, 2)),
    ],
    ids=lambda site: f"{site.kind}{len(site.kernel)}",
)
def test_patches_times_weight_is_the_layer(site: Site) -> None:
    x = torch.randn(3, 7, 4) if site.kind == "linear" else torch.randn(3, 4, *(9, 8, 7)[: len(site.kernel)])
    weight = torch.randn(site.shape)
    padded = F.pad(x, [size for pair in reversed(site.padding) for size in pair])
    if site.kind == "linear":
        y = F.linear(x, weight)
    else:
        y = (F.conv1d, F.conv2d, F.conv3d)[len(site.kernel) - 1](padded, weight, None, site.stride, 0, site.dilation)
    rows = patches(x, site)
    assert torch.allclose(rows @ weight.flatten(1).T, output_rows(y, site), atol=1e-5)
    some = patches(x, site, 5, torch.Generator().manual_seed(3))
    assert some.shape == (5, rows.shape[1])
    assert all(bool((row == rows).all(1).any()) for row in some)


def _fitted(tapes: Sequence[Tape]) -> FittedDivergence:
    wish = Divergence()
    return wish.fit([wish.outputs(tape.play().finish()) for tape in tapes])


def test_covariance_and_mean_of_a_layer(residual: nn.Module, images: Tensor) -> None:
    model = open_model(residual)
    tapes = [model.record(Batch((images[:24],))), model.record(Batch((images[24:],)))]
    (site,) = (site for site in model.sites() if site.name == "stem")
    ((_, metric),) = moments.stream_metrics(tapes, [site], _fitted(tapes))
    rows = patches(images, site).double()
    covariance = torch.cov(rows.T, correction=0)
    covariance.diagonal().add_(moments.INPUT_DAMPING * covariance.diagonal().mean())
    assert metric.inputs is not None
    assert metric.mean is not None
    assert metric.outputs is not None
    assert torch.allclose(metric.inputs, covariance, atol=1e-5)
    assert torch.allclose(metric.mean, rows.mean(0), atol=1e-6)
    assert torch.linalg.eigvalsh(metric.outputs)[0] > 0


def test_wide_layers_are_streamed_in_groups_within_the_limit(monkeypatch: pytest.MonkeyPatch, residual: nn.Module, images: Tensor) -> None:
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
