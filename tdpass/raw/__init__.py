"""Data as people have it: pictures, text and sound, made into what a model reads by its own processor.

There is one file per kind.
"""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.raw.base import RAW_KINDS as RAW_KINDS
from tdpass.raw.base import Raw as Raw
from tdpass.raw.base import RawKind as RawKind
from tdpass.raw.base import Reader as Reader
from tdpass.raw.base import raw_kind_of as raw_kind_of
from tdpass.raw.base import register_raw_kind as register_raw_kind

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
