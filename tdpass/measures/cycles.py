"""cycles: clock cycles of one call on a modelled machine."""

from __future__ import annotations

from tdpass.measures.base import COUNTS, Measure, Needs, register_measure

register_measure(
    Measure("cycles", "Cycles", "fewer cycles", "more cycles", "120M", COUNTS, needs=Needs.TARGET)
)
