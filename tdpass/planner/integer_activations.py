"""Layers that read integers of eight bits: which may, and in what ranges.

The ranges are seen on the compressed network's own activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tdpass.errors import PlanError, UnsupportedError
from tdpass.form import DYNAMIC
from tdpass.formats.base import FORMATS
from tdpass.formats.integers import Coded, IntegerOps, Value, apply_integers, coded
from tdpass.formats.layer import Layer
from tdpass.models.abilities import Range
from tdpass.ops import Pads
from tdpass.planner.calibrations import BINS, CALIBRATIONS, Histogram
from tdpass.tape import Tape

Ranges = Mapping[str, Range]


def reading_integers(layers: Mapping[str, Layer], how: Literal["dynamic", "static"]) -> dict[str, Layer]:
    """Those that may read integers, in the form that says so, ranges still to be set.

    Ranges of every call are found for linear layers alone.
    """
    found = {}
    for name, layer in layers.items():
        if how == DYNAMIC and layer.site.axes:
            continue
        wanted = replace(layer, form=replace(layer.form, activations=how))
        try:
            found[name] = wanted if wanted.storage.integer_factors else layer
        except PlanError:
            continue
    return found


def with_ranges(layer: Layer, ranges: Ranges) -> Layer:
    """The layer with the static ranges of what its factors are multiplied with."""
    held = {
        layer.storage.range_of(name): torch.tensor([found.scale, found.zero], dtype=torch.float32)
        for name, found in ranges.items()
    }
    return replace(layer, factors={**layer.factors, **held})


def ranges_on(
    tapes: Sequence[Tape], layers: Mapping[str, Layer], wanted: Mapping[str, Layer], calibration: str
) -> dict[str, Ranges]:
    """Ranges by site and factor, of the sites that the runs reach.

    Raises `UnsupportedError` for what is not finite.
    """
    ends = {name: _Ends(layer) for name, layer in wanted.items()}
    _play(tapes, {**layers, **ends})
    seen = {name: watch.seen for name, watch in ends.items() if watch.seen}
    for name, found in seen.items():
        if not all(math.isfinite(end) for low_high in found.values() for end in low_high):
            raise UnsupportedError(
                f"what {name!r} reads is NaN or infinite on the calibration data, so it has no range; leave "
                "such samples out"
            )
    counts = {name: _Counts(wanted[name], found) for name, found in seen.items()}
    if calibration != "minmax":
        _play(tapes, {**layers, **counts})
    choose = CALIBRATIONS.get(calibration)
    return {
        name: {factor: Range(*choose(histogram)) for factor, histogram in watch.histograms.items()}
        for name, watch in counts.items()
    }


def _play(tapes: Sequence[Tape], layers: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    with torch.no_grad():
        for tape in tapes:
            tape.play().fork(dict(layers)).finish()


class _Watching(IntegerOps):
    """Products in floating point, told what each factor is multiplied with."""

    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        self.see = see

    def linear(self, x: Value, weight: Value, bias: Value | None) -> Tensor:
        return super().linear(x, self._seen(x, weight), bias)

    def conv(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        return super().conv(x, self._seen(x, weight), bias, stride, padding, dilation, groups)

    def conv_transpose(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        return super().conv_transpose(x, self._seen(x, weight), bias, stride, cut, dilation, groups)

    def _seen(self, x: Value, weight: Value) -> Value:
        if not isinstance(weight, Coded):
            return weight
        assert isinstance(x, Tensor)
        self.see(weight.name, x)
        return weight.plain


@dataclass
class _Ends:
    """A layer that keeps the least and the largest of what its factors are multiplied with."""

    layer: Layer
    seen: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        return _watched(self.layer, x, self._see)

    def _see(self, name: str, x: Tensor) -> None:
        low, high = self.seen.get(name, (0.0, 0.0))
        found = float(x.min()), float(x.max())
        self.seen[name] = found if math.isnan(sum(found)) else (min(low, found[0]), max(high, found[1]))


@dataclass
class _Counts:
    """A layer that counts the numbers that its factors are multiplied with."""

    layer: Layer
    ends: Mapping[str, tuple[float, float]]
    histograms: dict[str, Histogram] = field(init=False)

    def __post_init__(self) -> None:
        self.histograms = {
            name: Histogram(low, high, np.zeros(BINS)) for name, (low, high) in self.ends.items()
        }

    def __call__(self, x: Tensor) -> Tensor:
        return _watched(self.layer, x, self._see)

    def _see(self, name: str, x: Tensor) -> None:
        histogram = self.histograms[name]
        if histogram.high > histogram.low:
            histogram.add(x.detach().float().numpy())


def _watched(layer: Layer, x: Tensor, see: Callable[[str, Tensor], None]) -> Tensor:
    """What a layer answers whose ranges are not set, in floating point; rows of a table are read, not multiplied."""
    if layer.site.table and not x.is_floating_point():
        return layer(x)
    held = {**{name: torch.ones(2) for name in layer.storage.ranges}, **layer.factors}
    values = coded(layer.storage, held, x.dtype)
    fmt, ops = FORMATS.get(layer.format), _Watching(see)
    return apply_integers(fmt, x, values, layer.bias, layer.site, layer.rank, ops)
