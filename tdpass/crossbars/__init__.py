"""Models on memristor crossbars: which weight lies in which cell, and what the arrays answer."""

from __future__ import annotations

from tdpass.crossbars.chips import CHIPS as CHIPS
from tdpass.crossbars.chips import chip as chip
from tdpass.crossbars.devices import Devices as Devices
from tdpass.crossbars.mapping import Mapped as Mapped
from tdpass.crossbars.mapping import load_mapped as load_mapped
from tdpass.crossbars.mapping import map_model as map_model
from tdpass.crossbars.simulation import Spread as Spread
from tdpass.crossbars.simulation import simulate as simulate
from tdpass.crossbars.simulation import simulated as simulated
