"""Alternating least squares for factors of any number, and the small systems that each step solves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Sweep = Callable[[State], tuple[State, float]]
WORK = 3 * 10**9
_RIDGES = {torch.float64: (1e-11, 1e-9, 1e-7, 1e-4), torch.float32: (3e-6, 1e-5, 1e-4, 1e-3)}
_EXACT = 1e-6
_ROUGH = 0.05
_SINGLE_FROM = 2 * 10**7
_RANGE = (1e-12, 1e12)


@dataclass(frozen=True)
class Limit:
    """When a search ends: after so many sweeps, at too small a gain, or when its work is done.

    A gain is too small below that part of the error. `work` is in multiply-adds, not in seconds, so that
    results repeat; `fewest` sweeps are made on the largest tensors too.
    """

    sweeps: int
    gain: float
    work: int = WORK
    fewest: int = 6


ANEW = Limit(40, 1e-4)
GOING_ON = Limit(20, 3e-5)  # it begins where a sweep gains little, and momentum takes some sweeps to build up
ROUGH = Limit(10, 3e-3, WORK // 6, 2)


def suits_single(macs: int, norm: float) -> bool:
    """Whether sweeps of so many multiply-adds are worth single precision.

    The tensor's square must be in its range.
    """
    return macs > _SINGLE_FROM and _RANGE[0] < norm < _RANGE[1]


def squared_norm(tensor: Tensor) -> float:
    """The squared norm, summed in double precision whatever the tensor's."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def alternate(
    start: State, sweep: Sweep, norm: float, macs: int, single: Sweep | None = None, limit: Limit = ANEW
) -> State:
    """Alternating least squares, each sweep started a step beyond the last.

    This is Nesterov's step with restarts (Mitchell et al. 2020). `sweep` returns the new state and its error.
    A sweep that makes the error grow is dropped, so the error never does.  An error that is rounding beside
    `norm`, the tensor's, ends it: beyond that, factors would only grow against each other. `macs` is what one
    sweep takes; large tensors get fewer sweeps. `single` is the sweep in single precision, at half the price:
    it goes first, and alone where the error it leaves is too large for rounding to matter.
    """
    if single is None:
        return _alternate(start, sweep, norm, macs, limit)[0]
    found, error = _alternate(tuple(factor.float() for factor in start), single, norm, macs, limit)
    state = tuple(factor.double() for factor in found)
    return state if error > _ROUGH * norm else _alternate(state, sweep, norm, macs, limit)[0]


def _alternate(start: State, sweep: Sweep, norm: float, macs: int, limit: Limit) -> tuple[State, float]:
    (best, error), step = sweep(start), 0.5
    ahead = best
    for _ in range(max(limit.fewest, min(limit.sweeps, limit.work // max(macs, 1))) - 1):
        if error <= _EXACT * norm:
            break
        state, reached = sweep(ahead)
        if reached > error:
            if ahead is best:
                break
            ahead, step = best, step / 2
            continue
        stalled = error - reached <= limit.gain * error
        ahead = tuple(new + step * (new - old) for new, old in zip(state, best, strict=True))
        best, error, step = state, reached, min(2.0, step * 1.1)
        if stalled:
            break
    return best, error


def solve_gram(gram: Tensor, right: Tensor) -> Tensor:
    """`gram^-1 right` for a positive semidefinite matrix made definite.

    It is given the least ridge, relative to its diagonal, that does so.
    """
    return solve_factored(factored_gram(gram), right)


def factored_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """What `solve_factored` solves with, for many right sides: a scale of the rows and a lower triangle."""
    diagonal, kind = gram.diagonal(), torch.finfo(gram.dtype)
    # What is below rounding beside the largest is noise; scaling it up to the rest would fit noise with large
    # numbers.
    scale = diagonal.clamp_min(float(diagonal.max()) * kind.eps / 2 + kind.tiny).rsqrt()
    scaled = (gram + gram.T).mul_(scale / 2).mul_(scale[:, None])
    ones, most = scaled.diagonal().clone(), scaled.diagonal()
    for ridge in _RIDGES[gram.dtype]:
        most.copy_(ones + ridge)
        triangle, info = torch.linalg.cholesky_ex(scaled)
        if int(info) == 0:
            break
    return scale, triangle


def solve_factored(factored: tuple[Tensor, Tensor], right: Tensor) -> Tensor:
    """`gram^-1 right` from `factored_gram`."""
    scale, triangle = factored
    return scale[:, None] * torch.cholesky_solve(scale[:, None] * right, triangle)


def normalized(factor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The factor with vectors of norm one along an axis, zeros excepted, and their norms."""
    norm: Tensor = factor.norm(dim=axis)
    return factor / norm.clamp_min(torch.finfo(norm.dtype).tiny ** 0.5).unsqueeze(axis), norm
