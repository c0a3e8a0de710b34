"""Which chains are worth a fused operator: measured once per machine, runtime and shape, and kept."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from tdpass.clock import interleaved
from tdpass.errors import UsageError
from tdpass.files import cache_folder
from tdpass.fusing.spec import Called, ChainCall
from tdpass.kernels import native
from tdpass.kernels.stage import Lanes
from tdpass.machine import processor
from tdpass.timings import Key, Row, TimingTable

PLAIN = "plain"
LANES: tuple[Lanes, ...] = ("channels", "pixels")

_ROUNDS, _LEAST_SECONDS = 9, 2e-3
_LEAST_ALONE = 1 / 0.95

K = TypeVar("K", bound=Hashable)
C = TypeVar("C", bound=Called)
Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class _Rules:
    lanes: tuple[Lanes, ...] = LANES
    measure: bool = True


_RULES = [_Rules()]


@dataclass(frozen=True)
class Trial(Generic[C]):
    """A chain to be timed in a runtime, which names its version, by that many threads.

    `calls` makes what is timed: the layers one by one, under `PLAIN`, and the operator with each family of
    lanes that serves it.
    """

    call: C
    runtime: str
    threads: int
    calls: Callable[[], Calls]

    def key(self, way: str) -> Key:
        """What the time of one way to run it depends on."""
        device, kernels = f"{processor()} {native.isa()}", native.version()
        dtype = str(self.call.dtype).removeprefix("torch.")
        return Key(
            device,
            f"{self.runtime}, kernels {kernels}",
            self.threads,
            self.call.size[0],
            dtype,
            str(self.call),
            f"chain {way}",
            (),
        )


@dataclass(frozen=True)
class Verdict:
    """The lane family to use, None where the plain chain is to stay.

    `seconds` are those of the fastest family, `plain` those of the plain chain; 0 where unmeasured.
    """

    lanes: Lanes | None
    seconds: float = 0.0
    plain: float = 0.0

    @property
    def best(self) -> float:
        """Seconds of what is chosen."""
        return self.plain if self.lanes is None else self.seconds

    @property
    def gain(self) -> float:
        """How many times as fast the operator is, where it was measured."""
        return self.plain / self.seconds


def served(device: str, dtype: torch.dtype) -> str:
    """Why there is no kernel for that device and type; empty where there is one."""
    if device != "cpu":
        return f"there are no fused kernels for {device}"
    if dtype not in native.DTYPES:
        known = " and ".join(str(each).removeprefix("torch.") for each in native.DTYPES)
        return f"the kernels compute in {known}, this is {dtype}"
    return native.missing()


@contextmanager
def choosing(lanes: str = "auto", *, measure: bool = True) -> Iterator[None]:
    """Within it, convolutions use one lane family, or with `measure` false all chains are fused unmeasured.

    `lanes` is "channels", "pixels", or "auto" for the faster.  Raises `UsageError` for another.
    """
    if lanes != "auto" and lanes not in LANES:
        raise UsageError(f"lanes={lanes!r} is not known; it is one of auto, {', '.join(LANES)}")
    _RULES.append(
        _Rules(LANES if lanes == "auto" else tuple(family for family in LANES if family == lanes), measure)
    )
    try:
        yield
    finally:
        _RULES.pop()


def measuring() -> bool:
    """Whether what is fused is to be measured, as `choosing` says."""
    return _RULES[-1].measure


def choose(trials: Sequence[Trial[ChainCall]], *, measure: bool = True) -> Verdict:
    """Whether to fuse a chain that is called so, and in which lanes; unmeasured, every chain is fused.

    A layer alone has to gain more than 5 %: its packed weight is a second copy.
    """
    spec, rules = trials[0].call.spec, _RULES[-1]
    families = LANES[:1] if spec.linear else rules.lanes
    if not measure or not rules.measure:
        return Verdict(families[0])
    return measured(trials, families, 1.0 if len(spec.stages) > 1 else _LEAST_ALONE)


def measured(trials: Sequence[Trial[Any]], families: Sequence[Lanes], least: float = 1.0) -> Verdict:
    """The fastest lane family over all calls of a chain, if more than `least` times as fast as plain."""
    rows = [_times(trial) for trial in trials]
    plain = sum(row[PLAIN] for row in rows)
    fused = {family: sum(row[family] for row in rows) for family in families}
    lanes = min(fused, key=lambda family: fused[family])
    return Verdict(lanes if fused[lanes] * least < plain else None, fused[lanes], plain)


def _times(trial: Trial[Any]) -> dict[str, float]:
    """Seconds of each way to run the chain, infinite where not served; measured where the table has none."""
    return kept_seconds({way: trial.key(way) for way in (PLAIN, *LANES)}, trial.calls, trial.threads)


def kept_seconds(keys: Mapping[str, Key], calls: Callable[[], Calls], threads: int) -> dict[str, float]:
    """Seconds of each way by the table of times, into which goes what it has not.

    `calls` makes what is timed; a way that it lacks takes infinitely long.
    """
    table = times_kept()
    known = table.get(keys.values())
    if len(known) < len(keys):
        seconds = seconds_of(calls(), threads)
        known = {key: Row(seconds.get(way, math.inf)) for way, key in keys.items()}
        table.put(known)
    return {way: known[key].seconds for way, key in keys.items()}


def seconds_of(
    calls: Mapping[K, Callable[[], object]], threads: int, rounds: int = _ROUNDS
) -> dict[K, float]:
    """Seconds of each call, all in turn: this thread's median time, or of several the least wall time."""
    alone = threads == 1
    with torch.inference_mode(mode=False), torch.no_grad():
        clock = time.thread_time if alone else time.perf_counter
        rows = interleaved(list(calls.values()), rounds, clock=clock, least=_LEAST_SECONDS, warm_up=0.0)
    return {key: statistics.median(row) if alone else min(row) for key, row in zip(calls, rows, strict=True)}


def times_kept() -> TimingTable:
    """The table of measured times in the cache folder."""
    return _table_in(cache_folder())


@functools.lru_cache(maxsize=1)
def _table_in(folder: Path) -> TimingTable:
    return TimingTable(folder)
