"""Tapes: a model's calls, recorded while it really runs, to be replayed with some layers replaced."""

from __future__ import annotations

from tdpass.tape.calls import Call as Call
from tdpass.tape.calls import Ref as Ref
from tdpass.tape.calls import leaves as leaves
from tdpass.tape.calls import mapped as mapped
from tdpass.tape.live import LiveTape as LiveTape
from tdpass.tape.playback import ADDITIONS as ADDITIONS
from tdpass.tape.playback import CHANNELWISE as CHANNELWISE
from tdpass.tape.playback import Playback as Playback
from tdpass.tape.playback import Replacement as Replacement
from tdpass.tape.playback import Tape as Tape
from tdpass.tape.playback import Watch as Watch
from tdpass.tape.playback import site_order as site_order
from tdpass.tape.recorder import record as record
from tdpass.tape.slices import slices_read as slices_read
