"""Supports: which entries of a factor are stored, all others being zero.

Importing this package registers all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.supports.base import SUPPORT as SUPPORT
from tdpass.supports.base import SUPPORTS as SUPPORTS
from tdpass.supports.base import Support as Support
from tdpass.supports.base import register_support as register_support
from tdpass.supports.base import support_named as support_named

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
