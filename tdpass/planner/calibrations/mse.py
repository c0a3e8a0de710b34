"""mse: the range with the least squared error."""

from __future__ import annotations

import numpy as np

from tdpass.planner.calibrations.base import STEPS, Histogram, best_share, register_calibration


@register_calibration
def mse(seen: Histogram) -> tuple[float, float]:
    """The share of the range in which the squared error of eight bits is least."""

    def error(share: float) -> float:
        low, high = share * seen.low, share * seen.high
        scale = (high - low) / STEPS
        values = seen.centers
        codes = np.clip(np.rint((values - low) / scale), 0, STEPS)
        return float((seen.counts * (codes * scale + low - values) ** 2).sum())

    return best_share(seen, error)
