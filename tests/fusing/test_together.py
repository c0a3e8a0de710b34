"""Parts chosen together: the best of all choices, whatever they save alone and with each other."""

from __future__ import annotations

import itertools
import random

import pytest

from tdpass.fusing.together import Shared, choose_together


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
