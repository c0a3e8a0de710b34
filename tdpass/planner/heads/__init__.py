"""Attention heads over fewer channels: those where queries meet keys, and values the layer behind them.

The scores of a head are `Q K^T` and what it adds to the output is `(P V) W_o^T`: both are products over the
width of a head that nothing else sees, so that they may be made over fewer channels, as many
in every head.
"""

from __future__ import annotations

from tdpass.planner.heads.attention import Attention as Attention
from tdpass.planner.heads.attention import find_attentions as find_attentions
from tdpass.planner.heads.bonds import Bond as Bond
from tdpass.planner.heads.bonds import Bonds as Bonds
from tdpass.planner.heads.find import find_bonds as find_bonds
from tdpass.planner.heads.narrow import Bases as Bases
from tdpass.planner.heads.narrow import find_bases as find_bases
from tdpass.planner.heads.narrow import narrowed as narrowed
from tdpass.planner.heads.selection import fitting as fitting
