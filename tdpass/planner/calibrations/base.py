"""What a calibration is: it says how much of a tensor's histogram its integers are to cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tdpass.registry import Registry

Counts = npt.NDArray[np.float64]
BINS = 2048
STEPS = 255
_SHARES = np.linspace(0.3, 1.0, 71)


@dataclass
class Histogram:
    """How often a tensor held numbers between `low` and `high`, zero among them, in equal bins."""

    low: float
    high: float
    counts: Counts

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count more values."""
        found, _ = np.histogram(values, bins=len(self.counts), range=(self.low, self.high))
        self.counts += found

    @property
    def centers(self) -> Counts:
        """The numbers in the middle of the bins."""
        width = (self.high - self.low) / len(self.counts)
        found: Counts = self.low + width * (np.arange(len(self.counts), dtype=np.float64) + 0.5)
        return found


Calibration = Callable[[Histogram], tuple[float, float]]
CALIBRATIONS: Registry[Calibration] = Registry("calibration")


def register_calibration(choose: Calibration) -> Calibration:
    """Decorator: make a calibration known by its function's name."""
    return CALIBRATIONS.add(choose.__name__, choose)


def best_share(seen: Histogram, loss: Callable[[float], float]) -> tuple[float, float]:
    """The share of the range that loses least; all of it where nothing was seen."""
    if not seen.counts.sum() or seen.high <= seen.low:
        return seen.low, seen.high
    share = min(_SHARES[::-1], key=loss)
    return float(share * seen.low), float(share * seen.high)
