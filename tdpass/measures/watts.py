"""watts: what a modelled machine draws while all of it works."""

from __future__ import annotations

from tdpass.measures.base import Measure, Needs, register_measure

_UNITS = {"W": 1.0, "mW": 1e-3, "uW": 1e-6, "\u00b5W": 1e-6, "\u03bcW": 1e-6}

register_measure(
    Measure(
        "watts",
        "Power",
        "less power",
        "more power",
        "200mW",
        _UNITS,
        whole=False,
        needs=Needs.TARGET,
        aliases=("power",),
        standing=True,
    )
)
