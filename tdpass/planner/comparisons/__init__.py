"""Comparisons: how far an output is from the original's, one file each.

Importing this package registers all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.planner.comparisons.base import COMPARISONS as COMPARISONS
from tdpass.planner.comparisons.base import Comparison as Comparison
from tdpass.planner.comparisons.base import register_comparison as register_comparison

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
