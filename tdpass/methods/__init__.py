"""Published methods that compress while training, each a short composition of constraints and terms."""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.methods.admm_nn import AdmmNN as AdmmNN
from tdpass.methods.admm_tt import AdmmTT as AdmmTT
from tdpass.methods.base import METHODS as METHODS
from tdpass.methods.base import Method as Method
from tdpass.methods.base import make_method as make_method
from tdpass.methods.base import register_method as register_method
from tdpass.methods.batude import Batude as Batude
from tdpass.methods.cascaded_projection import CascadedProjection as CascadedProjection
from tdpass.methods.channel_adaptive import ChannelAdaptive as ChannelAdaptive
from tdpass.methods.controller import Controller as Controller
from tdpass.methods.crossbar import Crossbar as Crossbar
from tdpass.methods.haloc import Haloc as Haloc
from tdpass.methods.incremental_tasks import IncrementalTasks as IncrementalTasks
from tdpass.methods.lc import Lc as Lc
from tdpass.methods.svd_training import SvdTraining as SvdTraining

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
