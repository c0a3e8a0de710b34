"""Measures: what a cost is counted in, one file each.  Importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.measures.base import MEASURES as MEASURES
from tdpass.measures.base import Measure as Measure
from tdpass.measures.base import Needs as Needs
from tdpass.measures.base import counted as counted
from tdpass.measures.base import measure_named as measure_named
from tdpass.measures.base import measures as measures
from tdpass.measures.base import register_measure as register_measure

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
