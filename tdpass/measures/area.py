"""area: square millimetres of a modelled machine that a layer takes."""

from __future__ import annotations

from tdpass.measures.base import Measure, Needs, register_measure

_UNITS = {"mm2": 1.0, "um2": 1e-6, "\u00b5m2": 1e-6, "cm2": 1e2}

register_measure(
    Measure(
        "area",
        "Area",
        "less area",
        "more area",
        "2 mm2",
        _UNITS,
        whole=False,
        needs=Needs.TARGET,
        standing=True,
    )
)
