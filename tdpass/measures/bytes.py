"""bytes: what the stored numbers take."""

from __future__ import annotations

from tdpass.measures.base import COUNTS, Measure, register_measure

register_measure(Measure("bytes", "Bytes", "fewer bytes", "more bytes", "2MiB", COUNTS, unit="B"))
