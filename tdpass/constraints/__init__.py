"""Constraints: sets of weights that one can project onto.  Importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.constraints.base import CONSTRAINTS as CONSTRAINTS
from tdpass.constraints.base import Constraint as Constraint
from tdpass.constraints.base import Shared as Shared
from tdpass.constraints.base import register_constraint as register_constraint

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
