"""joules: the energy of one call on a modelled machine."""

from __future__ import annotations

from tdpass.measures.base import Measure, Needs, register_measure

_UNITS = {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "\u00b5J": 1e-6, "\u03bcJ": 1e-6, "nJ": 1e-9, "pJ": 1e-12}

register_measure(
    Measure(
        "joules",
        "Energy",
        "less energy",
        "more energy",
        "5mJ",
        _UNITS,
        whole=False,
        needs=Needs.TARGET,
        aliases=("energy",),
    )
)
