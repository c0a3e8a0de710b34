"""Layers of real networks in every format, with and without data, in both precisions of the search."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tdpass.formats import FORMATS, Metric, Rank, alternating
from tdpass.formats.base import offered_formats
from tdpass.planner.candidates import SiteFits, enumerate_candidates
from tdpass.site import Site


def conv(*shape: int) -> Site:
    """A convolution that keeps the size of its input."""
    axes = len(shape) - 2
    return Site(
        "x".join(map(str, shape)),
        "conv",
        shape,
        (1,) * axes,
        tuple((k // 2, k // 2) for k in shape[2:]),
        (1,) * axes,
    )


def linear(*shape: int) -> Site:
    """A linear layer."""
    return Site("x".join(map(str, shape)), "linear", shape)


SITES = (
    linear(256, 256),
    linear(512, 96),
    linear(100, 320),
    linear(10, 512),
    linear(1, 64),
    linear(64, 1),
    conv(16, 3, 3, 3),
    conv(32, 16, 3, 3),
    conv(128, 64, 1, 1),
    conv(64, 1, 7, 7),
    conv(96, 64, 5),
    conv(12, 8, 3, 3, 3),
)
LARGE = (linear(1024, 128), linear(2048, 100), linear(256, 1024), conv(256, 128, 3, 3))
CASES = [
    pytest.param(name, site, id=f"{name}-{site.name}", marks=pytest.mark.slow if site in LARGE else ())
    for name in offered_formats()
    for site in SITES + LARGE
    if FORMATS.get(name).fits(site)
]
each_case = pytest.mark.parametrize(("name", "site"), CASES)
each_metric = pytest.mark.parametrize("data", [False, True], ids=["without", "with"])


def weight_of(site: Site) -> Tensor:
    """A weight of one part in a few directions and another in all."""
    generator = torch.Generator().manual_seed(site.weights)
    low = torch.randn(site.o, 4, generator=generator) @ torch.randn(
        4, site.weights // site.o, generator=generator
    )
    return (low + torch.randn(low.shape, generator=generator)).reshape(site.shape)


def metric_of(site: Site, data: bool) -> Metric:
    """What fewer samples than inputs show, damped as the planner does; or nothing."""
    if not data:
        return Metric()
    generator, width = torch.Generator().manual_seed(1), site.weights // site.o
    reads = torch.randn(width // 2 + 2, width, generator=generator, dtype=torch.float64).relu()
    sent = torch.randn(site.o + 2, site.o, generator=generator, dtype=torch.float64)
    return Metric(
        reads.T @ reads / len(reads) + 1e-3 * torch.eye(width), sent.T @ sent / len(sent), reads.mean(0)
    )


def few_ranks(name: str, site: Site) -> list[Rank]:
    """A cheap one first, for which what is shared is made, then the dearest that makes the layer smaller."""
    form = FORMATS.get(name)
    ranks = [rank for rank in form.ranks(site) if form.cost(site, rank).params < site.weights] or list(
        form.ranks(site)[:1]
    )
    return [ranks[len(ranks) // 4], ranks[len(ranks) // 2]]


@each_case
@each_metric
@pytest.mark.parametrize(
    "single_from",
    [pytest.param(0, id="single"), pytest.param(math.inf, id="double", marks=pytest.mark.slow)],
)
def test_factors_are_finite_and_better_than_nothing(
    name: str, site: Site, data: bool, single_from: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternating, "_SINGLE_FROM", single_from)
    form, weight, metric = FORMATS.get(name), weight_of(site).double(), metric_of(site, data)
    shared = form.decompose(weight, site, metric)
    for rank in few_ranks(name, site):
        factors = shared.factors(rank)
        assert all(
            factor.dtype == torch.float64 and bool(factor.isfinite().all()) for factor in factors.values()
        )
        assert metric.relative_error(weight, form.reconstruct(factors, site)) < 1


@pytest.mark.parametrize("data", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("name", [name for name in offered_formats() if FORMATS.get(name).searched])
def test_a_search_does_not_depend_on_the_precision_of_those_before_it(
    name: str, data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank is searched in double precision, the second in single, from what both share."""
    site = next(site for site in SITES if FORMATS.get(name).fits(site))
    form, weight, metric = FORMATS.get(name), weight_of(site).double(), metric_of(site, data)
    low, high = few_ranks(name, site)
    shared = form.decompose(weight, site, metric)
    monkeypatch.setattr(alternating, "_SINGLE_FROM", math.inf)
    shared.factors(low)
    monkeypatch.setattr(alternating, "_SINGLE_FROM", 0)
    after, alone = shared.factors(high), form.factorize(weight, site, high, metric)
    assert all(torch.equal(after[key], alone[key]) for key in alone)


@each_metric
@pytest.mark.parametrize("site", [linear(128, 96), conv(32, 16, 3, 3)], ids=lambda site: site.name)
def test_a_site_gets_candidates_of_every_format_that_can_make_it_smaller(site: Site, data: bool) -> None:
    found = enumerate_candidates(
        SiteFits(site, weight_of(site), None, metric_of(site, data)), offered_formats(), 2
    )
    plain = {
        name for name in offered_formats() if FORMATS.get(name).fits(site) and not FORMATS.get(name).searched
    }
    assert plain <= {candidate.format for candidate in found}
    assert all(0 <= candidate.error < 1 for candidate in found)
