"""Large tensors are swept in single precision, which must not show in the error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tdpass.formats import FORMATS, Metric, Rank, alternating
from tdpass.site import Site

SITE = Site("large", "conv", (96, 112, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
CASES: list[tuple[str, Rank]] = [("cp", (128,)), ("block_term", (4, 24, 28))]


def weight() -> Tensor:
    """A kernel whose spectra decay in both channel modes."""
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(96, 112, 3, 3, generator=generator, dtype=torch.float64)
    scales = (torch.arange(1, size + 1).double() ** -0.7 for size in core.shape[:2])
    mixed = (
        torch.linalg.qr(torch.randn(len(scale), len(scale), generator=generator, dtype=torch.float64))[0]
        * scale
        for scale in scales
    )
    return torch.einsum("oihw,po,qi->pqhw", core, *mixed)


def error(name: str, rank: Rank, kernel: Tensor) -> float:
    form = FORMATS.get(name)
    factors = form.decompose(kernel, SITE, Metric()).factors(rank)
    assert all(factor.dtype == torch.float64 for factor in factors.values())
    return Metric().relative_error(kernel, form.reconstruct(factors, SITE))


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_the_error_is_that_of_double_precision(
    name: str, rank: Rank, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = weight()
    found = error(name, rank, scale * kernel)
    monkeypatch.setattr(alternating, "_SINGLE_FROM", math.inf)
    assert found == pytest.approx(error(name, rank, kernel), rel=5e-4)


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_a_tensor_that_the_format_can_hold_is_found_as_well_as_in_double_precision(
    name: str, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, half = FORMATS.get(name), (rank[0] // 2, *(size // 2 for size in rank[1:]))
    kernel = form.reconstruct(form.decompose(weight(), SITE, Metric()).factors(half), SITE)
    found = error(name, rank, kernel)
    monkeypatch.setattr(alternating, "_SINGLE_FROM", math.inf)
    assert found <= 1.05 * error(name, rank, kernel) + 1e-6
