"""Torch models by name: `package.module:factory`, or a name behind the prefix of a source.

Prefixes are `timm:`, `torchvision:`, `hf:` and `zoo:`; there is one file per source.
"""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.sources.base import MODULE_SOURCES as MODULE_SOURCES
from tdpass.sources.base import ModuleSource as ModuleSource
from tdpass.sources.base import is_module as is_module
from tdpass.sources.base import module_of as module_of
from tdpass.sources.base import register_module_source as register_module_source
from tdpass.sources.weights import load_weights as load_weights

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
