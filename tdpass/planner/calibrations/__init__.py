"""Calibrations: ranges of activations from histograms.  Importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.planner.calibrations.base import BINS as BINS
from tdpass.planner.calibrations.base import CALIBRATIONS as CALIBRATIONS
from tdpass.planner.calibrations.base import Histogram as Histogram

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
