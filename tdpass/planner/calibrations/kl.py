"""kl: the range whose codes are distributed most like the numbers."""

from __future__ import annotations

import numpy as np

from tdpass.planner.calibrations.base import BINS, STEPS, Histogram, best_share, register_calibration

_SMOOTHED = BINS // 256 + 1


@register_calibration
def kl(seen: Histogram) -> tuple[float, float]:
    """The share of the range in which the distribution of codes is nearest to that of numbers.

    After Migacz 2017. Zeros, of which an activation makes many, are exact in any range and left out; counts
    are smoothed over as many bins as a code of the whole range covers, or the noise of few samples would ask
    for narrow ranges.
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
        places = np.arange(len(held)) * (STEPS + 1) // len(held)
        filled = held > 0
        sums, fills = (
            np.bincount(places, weights, minlength=STEPS + 1) for weights in (held, filled.astype(np.float64))
        )
        spread = np.where(filled, (sums / np.maximum(fills, 1))[places], 0.0)
        p, q = wanted / wanted.sum(), spread / max(spread.sum(), 1e-300)
        return float((p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-12))).sum())

    return best_share(seen, divergence)
