"""Passes: the rewrites a pipeline is made of, one per file, named by their verb.

Importing this package registers all of them.
"""

from __future__ import annotations

if __name__ == "passes":
    raise ImportError(
        "import tdpass.passes; the folder passes/ is a part of tdpass, not a package of its own"
    )

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
