"""Where heads of layers meet in a run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdpass.planner.heads.angles import Sets, Table


@dataclass(frozen=True)
class Side:
    """The first channel of every head of a layer: rows of its weight, or columns where it `reads` them."""

    site: str
    reads: bool
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Bond:
    """Heads of `left` and `right` that meet over `width` channels each, in `scores` or behind them.

    `groups` are the first channels of heads that can change only together: those that share a key or a value.
    `turned` says why the channels of a head stay as they are, where calls mix them before heads meet, and
    `sets` which of a head go together then, as pairs that share an angle do; none where all meet.
    """

    left: Side
    right: Side
    width: int
    scores: bool
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    turned: str = ""
    sets: Sets = ()


@dataclass(frozen=True)
class Bonds:
    """The bonds of a run, the weight and bias of every layer in it by site, and why layers take no part.

    `found` are those whose heads may hold other channels, `turned` those whose heads may hold fewer sets of
    them, with the `tables` that these are turned by.  `attentions` are bonds of queries and keys, turned
    or not, each with that of the values which their scores weigh.
    """

    found: tuple[Bond, ...]
    layers: dict[str, tuple[Tensor, Tensor | None]]
    reasons: dict[str, str]
    attentions: tuple[tuple[Bond, Bond], ...] = ()
    turned: tuple[Bond, ...] = ()
    tables: tuple[Table, ...] = ()
