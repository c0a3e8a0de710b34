"""Attentions in a recorded run: the layers of each, and which of its heads go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tdpass.models.streams import HeadCount
from tdpass.planner.heads.bonds import Bond, Bonds
from tdpass.planner.heads.find import find_bonds
from tdpass.site import Site
from tdpass.tape import Tape


@dataclass(frozen=True)
class Attention:
    """The bond of queries and keys, that of values and what reads them, and all bonds of the run.

    Heads that share a key or a value go together, in as many groups in both.  `mixable` are those of the two
    whose heads may hold other channels: not queries and keys that a rotary embedding turned.
    """

    scores: Bond
    values: Bond
    bonds: Bonds

    @property
    def makers(self) -> tuple[str, ...]:
        """The layers that make queries, keys and values."""
        return tuple(dict.fromkeys((self.scores.left.site, self.scores.right.site, self.values.left.site)))

    @property
    def reader(self) -> str:
        """The layer that reads all heads."""
        return self.values.right.site

    @property
    def mixable(self) -> tuple[Bond, ...]:
        return tuple(bond for bond in (self.scores, self.values) if not bond.turned)

    @property
    def groups(self) -> int:
        """How many groups of heads there are."""
        return len(self.scores.groups)

    @property
    def even(self) -> bool:
        """Whether a group of queries and keys goes with one of values, all of them alike."""
        numbers = [{tuple(map(len, group)) for group in bond.groups} for bond in (self.scores, self.values)]
        alike = all(len(number) == 1 for number in numbers) and self.groups == len(self.values.groups)
        return alike and self.scores.width == self.values.width

    def rows(self, site: str, group: int) -> list[int]:
        """The channels of a group of heads that a layer makes."""
        found = set[int]()
        for bond in (self.scores, self.values):
            for side, starts in zip((bond.left, bond.right), sorted(bond.groups)[group], strict=True):
                if side.site == site and not side.reads:
                    found.update(start + at for start in starts for at in range(bond.width))
        return sorted(found)

    def columns(self, group: int) -> list[int]:
        """The channels of a group of heads that the last layer reads."""
        starts = sorted(self.values.groups)[group][1]
        return sorted(start + at for start in starts for at in range(self.values.width))

    def count(self, groups: int, *, made: bool) -> HeadCount:
        """How many heads there are where so many groups stay."""
        sizes = {len(starts) for bond in (self.scores, self.values) for starts in bond.groups[0]}
        counts = {size * self.groups: size * groups for size in sizes}
        return HeadCount(self.values.width, counts, made=made, read=not made)


def find_attentions(tape: Tape, sites: Mapping[str, Site]) -> dict[str, Attention]:
    """The attentions of a run whose layers are all among these sites, each called once, by their reader."""
    bonds = find_bonds(tape)
    found = (Attention(scores, values, bonds) for scores, values in bonds.attentions)
    return {each.reader: each for each in found if sites.keys() >= {*each.makers, each.reader}}
