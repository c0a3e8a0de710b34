"""The smaller side decides what a decomposition in a metric takes, and no side decides what it finds."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from tdpass.formats import FORMATS, Metric
from tdpass.formats.metric import symmetric_roots
from tdpass.formats.spectrum import WeightedSvd
from tdpass.site import Site


def normal(*shape: int, seed: int) -> Tensor:
    """The same normal numbers every time."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(size: int, seed: int) -> Tensor:
    """A well-conditioned second moment."""
    rows = normal(2 * size, size, seed=seed)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_factors_are_those_of_the_exact_whitened_svd(shape: tuple[int, int], diagonal: bool) -> None:
    weight, c, g = normal(*shape, seed=0), moment(shape[1], 1), moment(shape[0], 2)
    metric = Metric(c.diagonal() if diagonal else c, g)
    (left, left_inverse), (right, right_inverse) = (
        symmetric_roots(g),
        symmetric_roots(torch.diag(c.diagonal()) if diagonal else c),
    )
    u, s, v = torch.linalg.svd(left @ weight @ right, full_matrices=False)
    found = WeightedSvd(weight, metric)
    for rank in (1, 5, 12):
        exact = left_inverse @ (u[:, :rank] * s[:rank]) @ v[:rank] @ right_inverse
        a, b = found.factors(rank)
        torch.testing.assert_close(a @ b, exact, rtol=1e-8, atol=1e-9)
        assert found.relative_error(rank) == pytest.approx(metric.relative_error(weight, exact), abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6625, 120), (120, 6625)])
def test_a_layer_of_low_rank_takes_seconds_however_wide_one_side_is(shape: tuple[int, int]) -> None:
    site, weight = Site("wide", "linear", shape), normal(*shape, seed=0)
    wide = torch.eye(6625, dtype=torch.float64) + 0.1 * torch.outer(*2 * [normal(6625, seed=1)])
    metric = Metric(moment(120, 2), wide) if shape[1] == 120 else Metric(wide, moment(120, 2))
    start = time.process_time()
    factors = FORMATS.get("svd").factorize(weight, site, (60,), metric)
    assert time.process_time() - start < 30
    assert metric.relative_error(weight, factors["u"] @ factors["v"]) == pytest.approx(
        WeightedSvd(weight, metric).relative_error(60), abs=1e-6
    )
