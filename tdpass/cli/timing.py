"""Interleaved timing: all candidates in every round, so that a neighbour's load hits them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LEAST_SECONDS = 0.02
_WARM_UP_SECONDS = 0.3


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of what the rounds gave."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, progress: Callable[[str, int, int], None]) -> list[list[float]]:
    """Seconds per call of every candidate in every round; the order is shuffled, the same way in every run.

    A short call is repeated within its round until the clock can resolve it.
    """
    repeats = []
    for index, call in enumerate(calls):
        progress("warm-up", index, len(calls))
        repeats.append(_warm_up(call))
    progress("warm-up", len(calls), len(calls))
    seconds: list[list[float]] = [[] for _ in calls]
    order, shuffler = list(range(len(calls))), random.Random(0)  # noqa: S311
    for done in range(rounds):
        progress("timing", done, rounds)
        shuffler.shuffle(order)
        for index in order:
            start = time.perf_counter()
            for _ in range(repeats[index]):
                calls[index]()
            seconds[index].append((time.perf_counter() - start) / repeats[index])
    progress("timing", rounds, rounds)
    return seconds


def _warm_up(call: Callable[[], object]) -> int:
    """Call it until it runs steadily; returns how many calls fill one round."""
    fastest, until = float("inf"), time.perf_counter() + _WARM_UP_SECONDS
    for attempt in range(1000):
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if attempt >= 2 and now >= until:
            break
    return max(1, round(_LEAST_SECONDS / max(fastest, 1e-9)))
