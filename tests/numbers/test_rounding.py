"""Rounding in second moments: on the grid, within the support, and never worse than number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdpass.numbers import numbers_named
from tdpass.planner.rounding import rounded_factor
from tdpass.supports import support_named

NUMBERS = [
    "int8",
    "int4",
    "int4/8",
    "int4/tensor",
    "int4/zero",
    "levels16",
    "float16",
    "float8_e4m3",
    "float8_e4m3/8",
]
SUPPORTS = ["2:4", "unstructured/50%", "rows/50%", "columns/50%", "blocks4x4/50%"]
CASES = [
    *((text, "") for text in NUMBERS),
    *(("float32", text) for text in SUPPORTS),
    ("int4", "2:4"),
    ("levels16", "unstructured/50%"),
]


def weight(groups: int = 1) -> tuple[Tensor, Tensor]:
    """A weight of 16 outputs, and covariances of inputs that go together."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(groups, 200, 32, generator=generator, dtype=torch.float64) @ torch.randn(
        groups, 32, 32, generator=generator, dtype=torch.float64
    )
    return torch.randn(16, 32, generator=generator, dtype=torch.float64), rows.transpose(1, 2) @ rows / 200


def error(found: Tensor, exact: Tensor, covariance: Tensor) -> float:
    parts = (found - exact).reshape(len(covariance), -1, exact.shape[1])
    return float(((parts @ covariance) * parts).sum())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("numbers", "support"), CASES)
def test_what_columns_lose_is_made_up_for_by_those_after_them(
    numbers: str, support: str, groups: int
) -> None:
    exact, covariance = weight(groups)
    kind, kept = numbers_named(numbers), support_named(support) if support else None
    moments, activations, nearest = (
        rounded_factor(exact, covariance, kind, kept, way) for way in ("moments", "activations", "nearest")
    )
    errors = [error(rounded.factor, exact, covariance) for rounded in (moments, activations, nearest)]
    assert errors[0] <= errors[1] * (1 + 1e-9)
    if numbers.startswith(("int", "levels")) and not support:
        assert errors[0] < 0.8 * errors[2]
    for rounded in (moments, activations, nearest):
        factor = rounded.factor
        assert int(factor.count_nonzero()) <= (exact.numel() if kept is None else kept.kept((16, 32)))
        on_grid = kind.rounded(factor, rounded.beside)
        torch.testing.assert_close(
            on_grid if kept is None else on_grid * (factor != 0), factor, rtol=1e-6, atol=1e-7
        )
    unknown = rounded_factor(exact, None, kind, kept)
    assert torch.equal(unknown.factor, nearest.factor)


def test_inputs_of_no_variance_are_rounded_one_by_one() -> None:
    exact, _ = weight()
    found = rounded_factor(exact, torch.zeros(1, 32, 32, dtype=torch.float64), numbers_named("int4"))
    assert bool(torch.isfinite(found.factor).all())
    assert float((found.factor - exact).abs().max()) <= 0.51 * float(exact.abs().max()) / 7
