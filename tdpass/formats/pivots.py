"""Pivots: rows of a tall matrix of which all others are small multiples."""

from __future__ import annotations

import torch
from torch import Tensor

from tdpass.errors import NumericalError

BOUND = 2.0
"""The largest coefficient of a row that is no pivot."""
_GAIN, _SWAPS, _FLOOR = 1.2, 24, 1e-12


def choose_pivots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `p` of `M[n, r]`, ascending, and `C[n - r, r]` with `M[rest] = C M[p]` and |C| at most `BOUND`.

    Gaussian elimination with partial pivoting, then swaps that each multiply the volume of the pivots by more
    than `BOUND` (Goreinov et al., How to Find a Good Submatrix, 2010).  Exact for a matrix of smaller rank
    too.
    """
    n, r = matrix.shape
    lu, swaps, _ = torch.linalg.lu_factor_ex(matrix)
    rows = _permuted(swaps, n)
    lower = torch.tril(lu, -1) + torch.eye(n, r, dtype=lu.dtype)
    coefficients = torch.empty_like(lower)
    coefficients[rows] = torch.linalg.solve_triangular(
        lower[:r], lower, upper=False, left=False, unitriangular=True
    )
    pivots = rows[:r].clone()
    while True:
        place = int(coefficients.abs().argmax())
        row, column = divmod(place, r)
        if not abs(float(coefficients[row, column])) > BOUND:  # NaN as well
            break
        step = coefficients[row] / coefficients[row, column]
        step[column] -= 1 / coefficients[row, column]
        coefficients -= coefficients[:, column : column + 1] @ step[None]
        pivots[column] = row
    order = pivots.argsort()
    pivots = pivots[order]
    return pivots, coefficients[_others(pivots, n)][:, order]


def leading_coefficients(matrix: Tensor) -> Tensor:
    """`C[n - r, r]` with `M[r:] = C M[:r]`.

    Raises `NumericalError` where the leading rows do not span the others well enough.
    """
    r = matrix.shape[1]
    solved: Tensor = torch.linalg.lstsq(matrix[:r].T, matrix[r:].T, driver="gelsd").solution.T
    left = float((solved @ matrix[:r] - matrix[r:]).norm())
    largest = float(solved.abs().max()) if solved.numel() else 0.0
    if not (largest <= 2 * BOUND and left <= 1e-9 * float(matrix.norm())):
        raise NumericalError(
            f"the leading {r} of {len(matrix)} rows do not make up the others by coefficients up to "
            f"{2 * BOUND:g}"
        )
    return solved


def order_of(pivots: Tensor, n: int) -> Tensor:
    """The pivots, then all other rows, each ascending."""
    return torch.cat([pivots, _others(pivots, n)])


def _others(pivots: Tensor, n: int) -> Tensor:
    left = torch.ones(n, dtype=torch.bool)
    left[pivots] = False
    return left.nonzero()[:, 0]


def _permuted(swaps: Tensor, n: int) -> Tensor:
    """The order of rows that LAPACK's swaps, counted from 1, end in."""
    rows = list(range(n))
    for place, other in enumerate(swaps.tolist()):
        rows[place], rows[other - 1] = rows[other - 1], rows[place]
    return torch.tensor(rows)


def choose_blocks(rows: Tensor, count: int) -> Tensor:
    """Blocks, ascending, of `rows[blocks, k, r]` whose rows make up the rest by small coefficients.

    One after another that of the largest volume beside those before it, then swaps that each multiply the
    volume of all by more than `_GAIN`.
    """
    left, chosen = rows.clone(), list[int]()
    least = _FLOOR * rows.square().sum((1, 2)).max() * torch.eye(rows.shape[1], dtype=rows.dtype)
    for _ in range(count):
        volumes = torch.linalg.det(left @ left.mT + least)
        volumes[chosen] = -1.0
        chosen.append(int(volumes.argmax()))
        along = torch.linalg.qr(left[chosen[-1]].T)[0]
        left = left - (left @ along) @ along.T
    size, blocks = rows.shape[1], torch.tensor(chosen)
    for _ in range(_SWAPS):
        others = _others(blocks, len(rows))
        solved = rows[others].flatten(0, 1) @ torch.linalg.pinv(rows[blocks].flatten(0, 1), rtol=1e-10)
        gains = torch.linalg.det(solved.reshape(len(others), size, count, size).transpose(1, 2)).abs()
        row, column = divmod(int(gains.argmax()), count)
        if not float(gains[row, column]) > _GAIN:  # NaN as well
            break
        blocks[column] = others[row]
    return blocks.sort().values
