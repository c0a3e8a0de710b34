"""macs: multiply-adds per sample, counted while the model runs."""

from __future__ import annotations

from tdpass.measures.base import COUNTS, Measure, Needs, register_measure

register_measure(Measure("macs", "MACs", "fewer MACs", "more MACs", "120M", COUNTS, needs=Needs.RUN))
