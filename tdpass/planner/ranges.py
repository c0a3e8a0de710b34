"""Ranges of activations from histograms: how much of what a tensor held its integers are to cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tdpass.registry import Registry

Counts = npt.NDArray[np.float64]
BINS = 2048
_STEPS = 255
_CUT = 1e-4
_SMOOTHED = BINS // 256 + 1
_SHARES = np.linspace(0.3, 1.0, 71)


@dataclass
class Histogram:
    """How often a tensor held numbers between `low` and `high`, zero among them, in equal bins."""

    low: float
    high: float
    counts: Counts

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count more values."""
        found, _ = np.histogram(values, bins=len(self.counts), range=(self.low, self.high))
        self.counts += found

    @property
    def centers(self) -> Counts:
        """The numbers in the middle of the bins."""
        width = (self.high - self.low) / len(self.counts)
        found: Counts = self.low + width * (np.arange(len(self.counts), dtype=np.float64) + 0.5)
        return found


Calibration = Callable[[Histogram], tuple[float, float]]
CALIBRATIONS: Registry[Calibration] = Registry("calibration")


def minmax(seen: Histogram) -> tuple[float, float]:
    """All that was seen."""
    return seen.low, seen.high


def percentile(seen: Histogram) -> tuple[float, float]:
    """All but one number in twenty thousand at either end."""
    shares = np.cumsum(seen.counts) / max(seen.counts.sum(), 1.0)
    edges = np.linspace(seen.low, seen.high, len(shares) + 1)
    low = edges[np.searchsorted(shares, _CUT / 2)] if seen.low < 0 else 0.0
    high = edges[min(np.searchsorted(shares, 1 - _CUT / 2) + 1, len(shares))] if seen.high > 0 else 0.0
    return min(float(low), 0.0), max(float(high), 0.0)


def mse(seen: Histogram) -> tuple[float, float]:
    """The share of the range in which the squared error of eight bits is least."""

    def error(share: float) -> float:
        low, high = share * seen.low, share * seen.high
        scale = (high - low) / _STEPS
        values = seen.centers
        codes = np.clip(np.rint((values - low) / scale), 0, _STEPS)
        return float((seen.counts * (codes * scale + low - values) ** 2).sum())

    return _best(seen, error)


def kl(seen: Histogram) -> tuple[float, float]:
    """The share of the range in which the distribution of the codes is nearest to that of the numbers (Migacz 2017).

    Zeros, of which an activation makes many, are exact in any range and left out; counts are smoothed over as
    many bins as a code of the whole range covers, or the noise of few samples would ask for narrow ranges.
    """
    counts = seen.counts.copy()
    counts[(np.abs(seen.centers) < (seen.high - seen.low) / len(counts))] = 0
    counts = np.convolve(counts, np.full(_SMOOTHED, 1 / _SMOOTHED), "same")

    def divergence(share: float) -> float:
        inside = (seen.centers >= share * seen.low) & (seen.centers <= share * seen.high)
        first, last = np.flatnonzero(inside)[[0, -1]]
        held = counts[first : last + 1]
        wanted = held.copy()
        wanted[0] += counts[:first].sum()
        wanted[-1] += counts[last + 1 :].sum()
        places = np.arange(len(held)) * (_STEPS + 1) // len(held)
        filled = held > 0
        sums, fills = (
            np.bincount(places, weights, minlength=_STEPS + 1)
            for weights in (held, filled.astype(np.float64))
        )
        spread = np.where(filled, (sums / np.maximum(fills, 1))[places], 0.0)
        p, q = wanted / wanted.sum(), spread / max(spread.sum(), 1e-300)
        return float((p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-12))).sum())

    return _best(seen, divergence)


def _best(seen: Histogram, loss: Callable[[float], float]) -> tuple[float, float]:
    if not seen.counts.sum() or seen.high <= seen.low:
        return seen.low, seen.high
    share = min(_SHARES[::-1], key=loss)
    return float(share * seen.low), float(share * seen.high)


for _calibration in (minmax, percentile, mse, kl):
    CALIBRATIONS.add(_calibration.__name__, _calibration)
