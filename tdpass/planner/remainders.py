"""Rounding what a few factors leave of a weight, and fitting these to what that rounding loses, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tdpass.errors import NumericalError
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.formats.storage import Storage
from tdpass.ops import TorchOps
from tdpass.planner.rounding import Way, rounded_factor

_TURNS = 3


def stored_beside(
    weight: Tensor, plain: Layer, form: Form, metric: Metric, covariance: Tensor | None, way: Way = "moments"
) -> dict[str, Tensor]:
    """The parts of a form with a remainder, `W = U V + Q(W - U V)`, for a weight.

    From the factors of `plain`, which are rounded first, the remainder `W - U V` is rounded in the second
    moments of the inputs (`covariance`, `[groups, d, d]`), so that it makes up for what they lost; then U V
    become the best factors of `W - Q` in the metric, in turns (Saha, Sagan, Srivastava, Goldsmith, Pilanci:
    CALDERA, 2024).  The turn with the least error in the metric is kept.  Raises `NumericalError` where none
    is finite.
    """
    fmt, storage = FORMATS.get(form.format), replace(plain, form=form).storage
    site, rest = plain.site, fmt.remainder
    factors: Mapping[str, Tensor] = {name: held for name, held in plain.factors.items() if name != rest}
    best: dict[str, Tensor] = {}
    least, remainder = float("inf"), torch.zeros_like(weight)
    for turn in range(_TURNS):
        if turn:
            factors = fmt.leading.begin(weight - remainder, site, metric).factors(form.rank)
        parts = _nearest(storage, {name: held.double() for name, held in factors.items()})
        held = {name: storage.restored(TorchOps(), name, parts, torch.float64) for name in factors}
        left = weight - fmt.leading.reconstruct(held, site)
        rounded = rounded_factor(left, covariance, storage.numbers[rest], storage.supports.get(rest), way)
        parts |= storage.stored(rest, rounded.factor, rounded.beside)
        remainder = rounded.factor
        error = metric.square((left - remainder).flatten(1))
        if error < least:
            best, least = parts, error
    if not best:
        raise NumericalError(
            f"the factors of {site.name!r} beside its remainder are beyond the range of '{form}'; leave the "
            "site out (exclude), or store it without such factors"
        )
    return best


def metric_of(covariance: Tensor | None) -> Metric:
    """The metric of that covariance of the inputs, by group."""
    if covariance is None:
        return Metric()
    return Metric(covariance[0]) if len(covariance) == 1 else Metric(covariance, groups=len(covariance))


def _nearest(storage: Storage, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for name, factor in factors.items():
        rounded = rounded_factor(factor, None, storage.numbers[name], storage.supports.get(name))
        parts |= storage.stored(name, rounded.factor, rounded.beside)
    return parts
