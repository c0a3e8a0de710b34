"""Streams: values that layers add to and norms read, whose coordinates a network does not mind.

After SliceGPT (Ashkboos et al., ICLR 2024). A normalization without scale and shift commutes with any
rotation, so the channels of a residual stream may be rotated by whatever writes to it and rotated back by
whatever reads it.  Rotated by its principal directions, the last channels hold next to nothing and can be
left out everywhere: what remains is a narrower dense network.  Every sum may begin coordinates of its own:
what a block reads then goes to its sum through the product of the two bases, a small linear shortcut.
"""

from __future__ import annotations

from tdpass.planner.streams.bases import Basis as Basis
from tdpass.planner.streams.bases import find_bases as find_bases
from tdpass.planner.streams.find import find_streams as find_streams
from tdpass.planner.streams.slicing import sliced as sliced
from tdpass.planner.streams.stream import Streams as Streams
