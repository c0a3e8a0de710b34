"""minmax: all that was seen."""

from __future__ import annotations

from tdpass.planner.calibrations.base import Histogram, register_calibration


@register_calibration
def minmax(seen: Histogram) -> tuple[float, float]:
    """All that was seen."""
    return seen.low, seen.high
