"""Parts chosen together: the best of all choices, whatever they save alone and with each other."""

from __future__ import annotations

import itertools
import random

import pytest

from tdpass.fusing.together import Shared, beside_neighbours, choose_together


def worth(chosen: frozenset[str], gains: dict[str, float], shared: list[Shared[str]]) -> float:
    alone = sum(gains[part] for part in chosen)
    return alone + sum(each.seconds for each in shared if each.parts <= chosen)


def shared(*parts: str, seconds: float) -> Shared[str]:
    return Shared(frozenset(parts), seconds)


def test_a_row_is_chosen_for_what_its_parts_save_together() -> None:
    gains = {"a": -1.0, "b": -1.0, "c": -1.0, "d": -1.0}
    row = [shared("a", "b", seconds=1.6), shared("b", "c", seconds=1.6), shared("c", "d", seconds=0.9)]
    assert choose_together(gains, []) == frozenset()
    assert choose_together(gains, row) == {"a", "b", "c"}


def test_parts_that_save_nothing_are_left() -> None:
    gains = {"a": 1e-6, "b": -1e-6, "c": 0.0}
    assert choose_together(gains, [shared("a", "b", seconds=0.5e-6)]) == {"a"}
    assert choose_together(gains, [shared("a", "b", seconds=2e-6)]) == {"a", "b"}
    assert choose_together(gains, [shared("b", seconds=0.0)]) == {"a"}


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_is_better(seed: int) -> None:
    chance = random.Random(seed)
    parts = list("abcdefg")
    gains = {part: chance.uniform(-2, 1) * 1e-5 for part in parts}
    together = [
        shared(*chance.sample(parts, chance.randint(1, 3)), seconds=chance.uniform(-0.5, 3) * 1e-5)
        for _ in range(8)
    ]
    saving = [each for each in together if each.seconds > 0]
    found = choose_together(gains, together)
    every = (frozenset(some) for count in range(8) for some in itertools.combinations(parts, count))
    best = max(worth(each, gains, saving) for each in every)
    assert worth(found, gains, saving) == pytest.approx(best, abs=1e-12)


def in_a_row(none: float, first: float, second: float, both: float) -> dict[frozenset[str], float]:
    parts = ("", "a", "b", "ab")
    return {frozenset(some): each for some, each in zip(parts, (none, first, second, both), strict=True)}


def test_what_passes_between_two_neighbours_counts_where_only_one_is_chosen() -> None:
    """Alone a part saves 2; where what is beside it stays as it is, 3 are lost again."""
    alone = {"a": 2.0, "b": 2.0}
    gains, shared_by = beside_neighbours(alone, [in_a_row(20, 21, 21, 16)])
    assert gains == {"a": -1.0, "b": -1.0}
    assert shared_by == [Shared(frozenset("ab"), 6.0)]
    assert choose_together(gains, shared_by) == {"a", "b"}
    with_plain = [{frozenset[str](): 20.0, frozenset("a"): 21.0}] * 2
    gains, shared_by = beside_neighbours(alone, with_plain)
    assert (gains, shared_by) == ({"a": -4.0, "b": 2.0}, [])


@pytest.mark.parametrize("seed", range(5))
def test_times_of_a_row_are_told_from_its_pairs(seed: int) -> None:
    """Every part has a time of its own either way, and a change between two neighbours costs 1."""
    chance = random.Random(seed)
    parts = "abcdef"
    own = {part: (chance.uniform(1, 4), chance.uniform(1, 4)) for part in parts}

    def seconds(chosen: frozenset[str], run: str) -> float:
        changes = sum((a in chosen) != (b in chosen) for a, b in itertools.pairwise(run))
        return changes + sum(own[part][part in chosen] for part in run)

    every = [frozenset(some) for count in range(7) for some in itertools.combinations(parts, count)]
    rows = [
        {some: seconds(some, a + b) for some in every if some <= {a, b}} for a, b in itertools.pairwise(parts)
    ]
    gains, together = beside_neighbours({part: plain - one for part, (plain, one) in own.items()}, rows)
    found = choose_together(gains, together)
    assert seconds(found, parts) == pytest.approx(min(seconds(some, parts) for some in every))
