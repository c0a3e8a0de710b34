"""seconds: the time of one call on a target."""

from __future__ import annotations

from tdpass.measures.base import Measure, Needs, register_measure

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ns": 1e-9}

register_measure(
    Measure(
        "seconds",
        "Time",
        "faster",
        "slower",
        "3ms",
        _UNITS,
        whole=False,
        needs=Needs.TARGET,
        aliases=("latency",),
    )
)
