"""params: numbers that are stored."""

from __future__ import annotations

from tdpass.measures.base import COUNTS, Measure, register_measure

register_measure(Measure("params", "Params", "fewer parameters", "more parameters", "120M", COUNTS))
