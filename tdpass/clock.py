"""Interleaved timing: all candidates in every round, so that a neighbour's load hits them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from tdpass.following import Progress, silent

Call = Callable[[], object]
_WARM_UP_CALLS = 3
_SMALL = 1 << 22  # multiply-adds of one sample


def interleaved(
    calls: Sequence[Call],
    rounds: int,
    progress: Progress = silent,
    clock: Callable[[], float] = time.perf_counter,
    least: float = 0.02,
    warm_up: float = 0.3,
) -> list[list[float]]:
    """Seconds per call of every candidate in every round; the order is shuffled, the same way in every run.

    A candidate is first run for `warm_up` seconds; a short call is repeated within its round until it fills
    `least` seconds.
    """
    repeats = []
    for index, call in enumerate(calls):
        progress("warm-up", index, len(calls))
        repeats.append(_warm_up(call, least, warm_up))
    progress("warm-up", len(calls), len(calls))
    seconds: list[list[float]] = [[] for _ in calls]
    order, shuffler = list(range(len(calls))), random.Random(0)  # noqa: S311
    for done in range(rounds):
        progress("timing", done, rounds)
        shuffler.shuffle(order)
        for index in order:
            start = clock()
            for _ in range(repeats[index]):
                calls[index]()
            seconds[index].append((clock() - start) / repeats[index])
    progress("timing", rounds, rounds)
    return seconds


def on_cpu(
    calls: Sequence[Call], threads: int, rounds: int, least: float = 2e-3, warm_up: float = 5e-3
) -> list[float]:
    """Seconds of each call.

    At one thread the median of processor time, which stands still while the process waits for its turn; at
    more the least wall time, since medians drown in what else the machine does.
    """
    with threads_of_torch(threads):
        if threads == 1:
            times = interleaved(calls, rounds, clock=time.process_time, least=least, warm_up=warm_up)
            return [statistics.median(rows) for rows in times]
        return [min(rows) for rows in interleaved(calls, rounds, least=least, warm_up=warm_up)]


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    """Let torch use that many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread_if_small(macs: int) -> Iterator[None]:
    """One thread of torch for a network of few multiply-adds a sample.

    More threads only wait for each other on so few, and spin while they wait. Where the number is 0 it is not
    known, and nothing changes.
    """
    before = torch.get_num_threads()
    if 0 < macs <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_up(call: Call, least: float, enough: float) -> int:
    """Call it until it runs steadily; returns how many calls fill one round."""
    fastest, until = float("inf"), time.perf_counter() + enough
    for attempt in range(1000):
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if attempt + 1 >= _WARM_UP_CALLS and now >= until:
            break
    return max(1, round(least / max(fastest, 1e-9)))
