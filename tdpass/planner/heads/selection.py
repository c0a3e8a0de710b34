"""Which sets of channels of heads stay where channels of a set cannot be told apart, as turned pairs cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tdpass.planner.heads.angles import Sets


@dataclass(frozen=True)
class Selection:
    """The sets of a head with what each adds to the scores, `energies`; those that add most stay."""

    sets: Sets
    energies: tuple[float, ...]

    def places(self, count: int) -> tuple[int, ...]:
        """The sets of most energy together among those that are `count` channels."""
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for place, (channels, energy) in enumerate(zip(self.sets, self.energies, strict=True)):
            for size, (value, taken) in sorted(best.items(), reverse=True):
                larger, more = size + len(channels), value + energy
                if larger <= count and more > best.get(larger, (-1.0, ()))[0]:
                    best[larger] = (more, (*taken, place))
        return best[count][1]

    def channels(self, count: int) -> tuple[int, ...]:
        """The channels that stay, in their order."""
        return tuple(sorted(channel for place in self.places(count) for channel in self.sets[place]))

    def turned(self, count: int) -> dict[int, int]:
        """How many channels of a head are turned before and after."""
        before = sum(len(channels) for channels in self.sets if len(channels) > 1)
        after = sum(len(self.sets[place]) for place in self.places(count) if len(self.sets[place]) > 1)
        return {before: after}

    def cut(self, count: int, *, padded: bool) -> tuple[Tensor, Tensor]:
        """`[width, count]`, or with `padded` `[width, width]`, for both sides: ones where channels stay."""
        width = sum(map(len, self.sets))
        whole, kept = torch.eye(width, dtype=torch.float64), list(self.channels(count))
        if padded:
            whole[:, [at for at in range(width) if at not in kept]] = 0
            return whole, whole
        return whole[:, kept], whole[:, kept]


def fitting(count: int, sets: Sequence[Sets]) -> int:
    """The largest number of channels up to `count`, else the smallest, that is whole sets of each of these."""
    reached = [reduce(_with, map(len, each), frozenset({0})) - {0} for each in sets]
    common = frozenset.intersection(*reached) if reached else frozenset({count})
    return max((number for number in common if number <= count), default=min(common))


def _with(sizes: frozenset[int], size: int) -> frozenset[int]:
    return sizes | {each + size for each in sizes}
