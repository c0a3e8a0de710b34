"""How far the range of what layers read is moved into their weights before both are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.numbers import Numbers

ALPHAS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_LEVELS, _LEAST = 255, 1e-5


@dataclass(frozen=True)
class Smoothing:
    """The scale of each channel, and the squared errors of the outputs with and without it."""

    scale: Tensor
    alpha: float
    error: float
    before: float


def smoothed(rows: Tensor, weights: Sequence[Tensor], numbers: Numbers) -> Smoothing | None:
    """The scales s with which `round(x / s) round(s W)` is nearest to `x W`, by squared error of all outputs.

    `rows` are what the layers read, `[n, d]`, `weights` theirs, `[o, d]`, float64.  The candidates are `s_j =
    max |x_j|^alpha / max |w_j|^(1 - alpha)`, over every weight's column j (Xiao et al., SmoothQuant, 2023);
    activations are rounded to eight bits in one range, weights to `numbers`.  None where all lose more than
    none does.
    """
    exact = [rows @ weight.T for weight in weights]
    reach = rows.abs().amax(0).clamp_min(_LEAST)
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp_min(_LEAST)
    before = _error(rows, weights, exact, torch.ones_like(reach), numbers)
    tried = []
    for alpha in ALPHAS:
        scale = (reach**alpha / columns ** (1 - alpha)).clamp_min(_LEAST)
        scale = scale / torch.exp(scale.log().mean())
        tried.append(Smoothing(scale, alpha, _error(rows, weights, exact, scale, numbers), before))
    best = min(tried, key=lambda found: found.error)
    return best if best.error < before else None


def _error(
    rows: Tensor, weights: Sequence[Tensor], exact: Sequence[Tensor], scale: Tensor, numbers: Numbers
) -> float:
    read = _rounded(rows / scale)
    made = (read @ _stored(weight * scale, numbers).T for weight in weights)
    return sum(float((y - wanted).square().sum()) for y, wanted in zip(made, exact, strict=True))


def _stored(weight: Tensor, numbers: Numbers) -> Tensor:
    return numbers.rounded(weight, numbers.fit(weight))


def _rounded(x: Tensor) -> Tensor:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / _LEVELS or 1.0
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, _LEVELS).sub(zero) * step
