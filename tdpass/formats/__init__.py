"""Formats: the ways to factor a weight.  Importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.form import Rank as Rank
from tdpass.formats.base import FORMATS as FORMATS
from tdpass.formats.base import Decomposition as Decomposition
from tdpass.formats.base import Factors as Factors
from tdpass.formats.base import Format as Format
from tdpass.formats.base import Guarantee as Guarantee
from tdpass.formats.base import Stage as Stage
from tdpass.formats.base import register_format as register_format
from tdpass.formats.layer import Layer as Layer
from tdpass.formats.metric import Metric as Metric

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
