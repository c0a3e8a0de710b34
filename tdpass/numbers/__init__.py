"""Number types: how the values of a factor are stored.  Importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.numbers.base import NUMBERS as NUMBERS
from tdpass.numbers.base import SCALE as SCALE
from tdpass.numbers.base import VALUES as VALUES
from tdpass.numbers.base import Earlier as Earlier
from tdpass.numbers.base import Numbers as Numbers
from tdpass.numbers.base import Part as Part
from tdpass.numbers.base import numbers_named as numbers_named
from tdpass.numbers.base import register_numbers as register_numbers

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
