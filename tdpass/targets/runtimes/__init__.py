"""Runtimes: the ways to run a layer or a model on a target, one per file.

Importing this package registers all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.targets.runtimes.base import RUNTIMES as RUNTIMES
from tdpass.targets.runtimes.base import Runtime as Runtime
from tdpass.targets.runtimes.base import register_runtime as register_runtime

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
