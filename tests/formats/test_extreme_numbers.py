"""Weights and data at the ends of the range: finite factors, or an error that says why there are none."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.errors import NumericalError
from tdpass.formats import FORMATS, Metric
from tdpass.formats.metric import eigenpairs, eigenvalues
from tdpass.planner.candidates import SiteFits, enumerate_candidates
from tdpass.site import Site

LINEAR = Site("linear", "linear", (24, 36), extents=(((1,), (1,)),))
CONV = Site("conv", "conv", (12, 16, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), extents=(((6, 6), (6, 6)),))
CASES = [(name, site) for name in FORMATS.names() for site in (LINEAR, CONV) if FORMATS.get(name).fits(site)]
WEIGHTS = {
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "huge": lambda weight: 1e30 * weight,
    "tiny": lambda weight: 1e-30 * weight,
    "one_row": lambda weight: (
        weight * (torch.arange(len(weight)) == 0).reshape(-1, *[1] * (weight.dim() - 1))
    ),
}


def metric_of(site: Site, kind: str) -> Metric:
    """One sample, exploding activations, a dead input, or samples all the same and so of rank one."""
    width, generator = site.weights // site.o, torch.Generator().manual_seed(1)
    rows = torch.randn(1 if kind == "one" else 8, width, generator=generator, dtype=torch.float64)
    if kind == "same":
        same = (
            rows[:1].T @ rows[:1]
        )  # in single precision, as sums over samples are, and so indefinite by rounding
        same.diagonal().sub_(1e-7 * same.diagonal().mean())
        return Metric(same, None, rows[0])
    level = {"one": 1.0, "exploding": 1e30, "dead": 0.0}[kind]
    inputs = level**2 * rows.T @ rows / len(rows)
    inputs.diagonal().add_(1e-3 * float(inputs.diagonal().mean()) + 1e-12)
    return Metric(inputs, None, level * rows.mean(0))


@pytest.mark.parametrize(("name", "site"), CASES, ids=[f"{name}-{site.name}" for name, site in CASES])
@pytest.mark.parametrize("kind", ["one", "exploding", "dead", "same"])
@pytest.mark.parametrize("values", list(WEIGHTS))
def test_factors_are_finite_and_no_worse_than_nothing(name: str, site: Site, kind: str, values: str) -> None:
    weight = WEIGHTS[values](
        torch.randn(site.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    form, metric = FORMATS.get(name), metric_of(site, kind)
    ranks = form.ranks(site)
    factors = form.factorize(weight, site, ranks[len(ranks) // 3], metric)
    assert all(bool(factor.isfinite().all()) for factor in factors.values())
    assert metric.relative_error(weight, form.reconstruct(factors, site)) <= 1 + 1e-6


def test_eigenpairs_of_what_is_not_finite_are_refused() -> None:
    for solve in (eigenpairs, eigenvalues):
        with pytest.raises(NumericalError, match="3 x 3 holds values that are not finite"):
            solve(torch.full((3, 3), torch.nan, dtype=torch.float64))


def test_where_divide_and_conquer_fails_scaled_iterations_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    rows = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = 1e40 * rows @ rows.T
    expected = torch.linalg.eigvalsh(gram)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    values, vectors = eigenpairs(gram)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e30)
    torch.testing.assert_close(eigenvalues(gram), expected, rtol=1e-9, atol=1e30)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, gram, rtol=1e-9, atol=1e30)


def test_a_site_that_no_format_can_be_fitted_to_says_why() -> None:
    weight = torch.full(LINEAR.shape, torch.inf)
    with pytest.raises(NumericalError, match="no format can be fitted to site 'linear'"):
        enumerate_candidates(SiteFits(LINEAR, weight, None, Metric()), FORMATS.names(), 4)


def scaled(levels: dict[str, float]) -> nn.Module:
    """A small network with layers scaled up or down."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    with torch.no_grad():
        for name, level in levels.items():
            model.get_submodule(name).weight.mul_(level)
    return model


@pytest.mark.parametrize("samples", [1, 40])
@pytest.mark.parametrize("levels", [{"2": 0.0}, {"0": 1e20}, {"0": 1e18, "2": 1e18}, {"0": 1e-30}], ids=str)
@pytest.mark.parametrize("effort", ["fast", pytest.param("normal", marks=pytest.mark.slow)])
def test_planning_on_extreme_activations_gives_a_plan_of_finite_losses(
    samples: int, levels: dict[str, float], effort: str
) -> None:
    with warnings.catch_warnings(record=True):
        found = tdpass.make_plan(
            scaled(levels), {"params": 0.7}, torch.randn(samples, 16), effort=effort, cache=False
        )
    assert found.plan.planned.params <= 0.7 * found.plan.original.params
    assert all(0 <= choice.loss < float("inf") and 0 <= choice.error <= 1 + 1e-6 for choice in found.plan)
