"""Choosing parts of a model all at once, where what one of them saves depends on which others are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from tdpass.fusing.spec import N


@dataclass(frozen=True)
class Shared(Generic[N]):
    """Seconds, none of them negative, that are saved where all of these parts are chosen."""

    parts: frozenset[N]
    seconds: float


def beside_neighbours(
    alone: Mapping[N, float], rows: Sequence[Mapping[frozenset[N], float]]
) -> tuple[dict[N, float], list[Shared[N]]]:
    """What parts save where their neighbours stay as they are, and what two neighbours save beyond that.

    `alone` are the seconds that each saves cut out by itself, `rows` the seconds that a part and a neighbour
    take in a row, by which of them are chosen: none, one, and both where both can be.  What a part saves
    beside a neighbour differs from what it saves alone by what passes between the two.
    """
    gains, shared = dict(alone), list[Shared[N]]()
    for seconds in rows:
        saved = {chosen: seconds[frozenset()] - each for chosen, each in seconds.items()}
        single = {part: saved[chosen] for chosen in saved if len(chosen) == 1 for part in chosen}
        for part, gain in single.items():
            gains[part] += gain - alone[part]
        shared += [
            Shared(chosen, saved[chosen] - sum(single[part] for part in chosen))
            for chosen in saved
            if len(chosen) > 1
        ]
    return gains, shared


def choose_together(gains: Mapping[N, float], shared: Sequence[Shared[N]]) -> frozenset[N]:
    """The parts that save most in sum, by themselves and together; those that save nothing are left.

    `gains` are the seconds that each saves by itself, negative where it loses.  A selection problem (Rhys
    1970): maximize sum g_p x_p + sum s_e z_e with z_e <= x_p for every p in e, 0 <= x, z <= 1, whose linear
    program has whole solutions.
    """
    alone = frozenset(part for part, gain in gains.items() if gain > 0)
    offered = [each for each in shared if each.seconds > 0 and not each.parts <= alone]
    if not offered:
        return alone
    # it takes long to import, and is needed where parts share alone
    from scipy.optimize import LinearConstraint, milp  # noqa: PLC0415
    from scipy.sparse import csr_array  # noqa: PLC0415

    parts = list(gains)
    place = {part: index for index, part in enumerate(parts)}
    worth = np.array([*gains.values(), *(each.seconds for each in offered)])
    pairs = [(len(parts) + e, place[part]) for e, each in enumerate(offered) for part in each.parts]
    rows = np.repeat(np.arange(len(pairs)), 2)
    entries = (np.tile([1.0, -1.0], len(pairs)), (rows, np.array(pairs).ravel()))
    below = LinearConstraint(csr_array(entries, shape=(len(pairs), len(worth))), ub=0)
    found = milp(-worth / np.abs(worth).max(), constraints=below, bounds=(0, 1), integrality=1)
    return frozenset(part for part, taken in zip(parts, found.x, strict=False) if taken > 1 / 2)
