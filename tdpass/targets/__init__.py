"""Targets: machines that a plan is made for, and what a layer costs there.

Importing this package registers all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.targets.base import ONE_CALL as ONE_CALL
from tdpass.targets.base import TARGETS as TARGETS
from tdpass.targets.base import Setting as Setting
from tdpass.targets.base import Target as Target
from tdpass.targets.base import TimedTarget as TimedTarget
from tdpass.targets.base import Timing as Timing
from tdpass.targets.base import check_target as check_target
from tdpass.targets.base import open_target as open_target
from tdpass.targets.base import register_target as register_target
from tdpass.targets.break_even import BreakEven as BreakEven
from tdpass.targets.break_even import BreakEvenRow as BreakEvenRow
from tdpass.targets.break_even import BreakEvenTable as BreakEvenTable
from tdpass.targets.break_even import open_break_even as open_break_even

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
