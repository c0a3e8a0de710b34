"""percentile: all but the outermost numbers."""

from __future__ import annotations

import numpy as np

from tdpass.planner.calibrations.base import Histogram, register_calibration

_CUT = 1e-4


@register_calibration
def percentile(seen: Histogram) -> tuple[float, float]:
    """All but one number in twenty thousand at either end."""
    shares = np.cumsum(seen.counts) / max(seen.counts.sum(), 1.0)
    edges = np.linspace(seen.low, seen.high, len(shares) + 1)
    low = edges[np.searchsorted(shares, _CUT / 2)] if seen.low < 0 else 0.0
    high = edges[min(np.searchsorted(shares, 1 - _CUT / 2) + 1, len(shares))] if seen.high > 0 else 0.0
    return min(float(low), 0.0), max(float(high), 0.0)
