"""Levels chosen together."""

from __future__ import annotations

import itertools

import pytest
import torch

from tdpass.constraints.lattice import Lattice
from tdpass.errors import UsageError


def problem(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
    return root @ root.T / size, torch.randn(size, generator=generator, dtype=torch.float64), torch.randn(size, generator=generator, dtype=torch.float64)


def loss(matrix: torch.Tensor, slope: torch.Tensor, move: torch.Tensor) -> float:
    return float(slope @ move + move @ matrix @ move / 2)


@pytest.mark.parametrize("seed", range(5))
def test_descent_ends_where_no_single_change_helps(seed: int) -> None:
    matrix, slope, centre = problem(seed, 6)
    lattice = Lattice(torch.full((6,), 0.5, dtype=torch.float64), torch.full((6,), 2.0, dtype=torch.float64))
    found = lattice.descend(matrix, slope, centre)
    here = loss(matrix, slope, found - centre)
    assert here <= loss(matrix, slope, lattice.nearest(centre) - centre)
    for k, level in itertools.product(range(6), (-1.0, -0.5, 0.5, 1.0)):
        other = found.clone()
        other[k] = level
        assert here <= loss(matrix, slope, other - centre) + 1e-9
    assert set(found.abs().tolist()) <= {0.5, 1.0}


def test_without_correlations_descent_is_rounding() -> None:
    lattice = Lattice(torch.tensor([0.1, 0.1, 1.0], dtype=torch.float64), torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    centre = torch.tensor([-0.9, 0.27, 0.01], dtype=torch.float64)
    assert torch.equal(lattice.descend(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), centre), lattice.nearest(centre))
    torch.testing.assert_close(lattice.nearest(centre), torch.tensor([-0.1, 0.3, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(("intervals", "counts"), [([0.1, 0.2], [1.0]), ([0.0], [1.0]), ([0.1], [0.0])])
def test_impossible_lattices_are_refused(intervals: list[float], counts: list[float]) -> None:
    with pytest.raises(UsageError):
        Lattice(torch.tensor(intervals), torch.tensor(counts))
