"""Where the epochs of a training run are shown beside its log.csv; one file per logger."""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.loggers.base import LOGGERS as LOGGERS
from tdpass.loggers.base import Logger as Logger
from tdpass.loggers.base import register_logger as register_logger
from tdpass.loggers.base import started as started

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
