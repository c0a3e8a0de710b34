"""Front ends: every kind of model that `compress` takes, one file each.

Importing this package registers all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.models.front_ends.base import FRONT_ENDS as FRONT_ENDS
from tdpass.models.front_ends.base import FrontEnd as FrontEnd
from tdpass.models.front_ends.base import front_end_of as front_end_of
from tdpass.models.front_ends.base import front_end_of_file as front_end_of_file
from tdpass.models.front_ends.base import register_front_end as register_front_end

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
