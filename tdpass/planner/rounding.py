"""Rounding a matrix column by column, what each column loses made up for by those after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tdpass.numbers import Numbers
from tdpass.supports import Support

Way = Literal["moments", "activations", "nearest"]
_DAMPING = (1e-2, 1e-1, 1.0)
_BLOCK = 64


@dataclass(frozen=True)
class Rounded:
    """A factor whose entries are all among the numbers that it will be stored in.

    With it are the parts beside its values, such as scales.
    """

    factor: Tensor
    beside: Mapping[str, Tensor]


def rounded_factor(
    factor: Tensor,
    covariance: Tensor | None,
    numbers: Numbers,
    support: Support | None = None,
    way: Way = "moments",
) -> Rounded:
    """A factor rounded to a number type, and to the entries that a support keeps, float64.

    `covariance` is C of what the rows of the factor, seen as a matrix W, are multiplied by: `[groups, d, d]`,
    one for each part of the rows, or None where it is not known.  With `moments` columns are rounded in order
    and the others updated, `W -= (w_j - q_j) (H_jj)^-1 H_j` with `H = C^-1` (Frantar, Ashkboos, Hoefler,
    Alistarh 2023), where the support keeps what is largest in `w^2 / H_jj` (Frantar and Alistarh 2023).  With
    `activations` and `nearest` nothing is made up for, and it keeps what is largest in `w^2 C_jj` (Sun, Liu,
    Bair, Kolter 2024) and in magnitude.  Scales are such that the error is least, weighed by C_jj where it is
    known.
    """
    matrix = factor.double().flatten(1)
    if covariance is None or way == "nearest":
        return _independently(matrix, None, factor.shape, numbers, support)
    spread = covariance.diagonal(dim1=1, dim2=2).repeat_interleave(matrix.shape[0] // covariance.shape[0], 0)
    roots = None if way == "activations" else _inverse_roots(covariance)
    if roots is None:
        return _independently(matrix, spread, factor.shape, numbers, support)
    inverse = (
        roots.square().sum(1).repeat_interleave(matrix.shape[0] // covariance.shape[0], 0)
    )  # the diagonal of U^T U
    kept = None if support is None else _kept(support, matrix.square() / inverse, factor.shape)
    weights = spread if kept is None else spread * kept
    shape = tuple(factor.shape)
    beside = numbers.fit((matrix if kept is None else matrix * kept).reshape(shape), weights.reshape(shape))
    found = matrix.clone()
    for rows, root in zip(torch.arange(len(matrix)).chunk(len(roots)), roots, strict=True):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        _compensated(found, part, root, kept, partial(numbers.column, beside=beside, shape=shape, rows=part))
    alone = _independently(matrix, spread, factor.shape, numbers, support)
    if _error(alone.factor.flatten(1) - matrix, covariance) < _error(found - matrix, covariance):
        return alone
    return Rounded(found.reshape(shape), beside)


def _kept(support: Support, scores: Tensor, shape: torch.Size) -> Tensor:
    """What a support keeps of a factor of that shape, as a matrix."""
    return support.choose(scores.reshape(shape)).flatten(1)


def _error(difference: Tensor, covariance: Tensor) -> float:
    """`tr D C D^T` of all groups."""
    parts = difference.reshape(len(covariance), -1, difference.shape[1])
    return float(((parts @ covariance) * parts).sum())


def _independently(
    matrix: Tensor, spread: Tensor | None, shape: torch.Size, numbers: Numbers, support: Support | None
) -> Rounded:
    weights = torch.ones_like(matrix) if spread is None else spread
    kept = None if support is None else _kept(support, matrix.square() * weights, shape)
    masked, weights = (matrix, weights) if kept is None else (matrix * kept, weights * kept)
    beside = numbers.fit(
        masked.reshape(shape), None if spread is None and kept is None else weights.reshape(shape)
    )
    rounded = numbers.rounded(masked.reshape(shape), beside)
    return Rounded(rounded if kept is None else rounded * kept.reshape(shape), beside)


def _inverse_roots(covariance: Tensor) -> Tensor | None:
    """Upper triangular U with `U^T U = C^-1` of each damped covariance.

    None where there is none in floating point.
    """
    level = covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    for damping in _DAMPING:
        try:
            damped = covariance + (damping * level + 1e-300) * torch.eye(
                covariance.shape[1], dtype=covariance.dtype
            )
            roots: Tensor = torch.linalg.cholesky(
                torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True
            )
        except LinAlgError:
            continue
        if bool(torch.isfinite(roots).all()):
            return roots
    return None


def _compensated(
    found: Tensor, rows: slice, root: Tensor, kept: Tensor | None, rounded: Callable[..., Tensor]
) -> None:
    """Round these rows in place, column by column."""
    width = found.shape[1]
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        block = found[rows, start:end].clone()
        errors = torch.zeros_like(block)
        for place in range(end - start):
            column = start + place
            wanted = block[:, place] if kept is None else block[:, place] * kept[rows, column]
            found[rows, column] = rounded(wanted, place=column) * (1 if kept is None else kept[rows, column])
            errors[:, place] = (block[:, place] - found[rows, column]) / root[column, column]
            block[:, place:] -= errors[:, place, None] * root[column, column:end]
        found[rows, end:] -= errors @ root[start:end, end:]
