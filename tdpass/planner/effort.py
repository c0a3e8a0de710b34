"""How much time planning may take, and how it is shared out among sites."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tdpass.errors import UsageError
from tdpass.models.batch import Batch
from tdpass.registry import nearest
from tdpass.site import Site
from tdpass.tape import Tape

RATE = 2e10
_LARGE = 1e9
_PASSES = 6
_RUNS = 3  # over all samples: what the original answers, and the recording
_REPAIRED = 20  # runs of a model that is compressed, recorded and repaired
_FEWEST = 32  # samples that are used however little time there is
_FITS, _CANDIDATES = 4, 16  # fits of a site that iterate, and candidates of one
_ITERATIONS = 8
_SEARCHED, _SEARCH = 3, 0.15  # formats of a site that search, and seconds that a rough search takes
_TRIES = 4
_FEW = 16  # samples


@dataclass(frozen=True)
class Effort:
    """What a planning run of a model of `macs` multiply-adds a sample may cost.

    `seconds` of one core for a model of up to 1 GMAC a sample, in proportion above; infinite for no limit.
    Losses are `measured` on up to `sweep_samples`, else estimated from the metric alone; `ranks` candidates
    per format, the searched ones found by a `rough` search, `searches` of them at most.  Past a deadline
    `ends` ranks of every format are tried that need no search; of one that has none, none is begun that would
    not be done before it.  `samples` of the data are used where the caller does not say how many.  A
    multiply-add takes `pace` seconds where the model runs.
    """

    name: str
    seconds: float
    moment_samples: int
    sweep_samples: int
    ranks: int
    searches: int
    measured: bool
    rough: bool
    ends: int = 2
    samples: int = 512
    macs: int = 0
    pace: float = 1 / RATE

    def of(self, macs: int, pace: float = 1 / RATE) -> Effort:
        """The effort for a model of so many multiply-adds a sample, each of which takes `pace` seconds."""
        return replace(self, macs=macs, pace=pace)

    @property
    def limit(self) -> float:
        """Seconds of one core."""
        return self.seconds * max(1.0, self.macs / _LARGE)

    def for_moments(self, tapes: Sequence[Tape]) -> list[Tape]:
        """As many recorded runs, from the first on, as the second moments may take a third of the time for.

        Runs that call a site which none of these calls are added.
        """
        taken = first_samples(tapes, min(self.moment_samples, self._affordable(0.3, _PASSES)))
        called = {name for tape in taken for name in tape.site_calls}
        for tape in tapes[len(taken) :]:
            if not called.issuperset(tape.site_calls):
                taken.append(tape)
                called.update(tape.site_calls)
        return taken

    def for_losses(self, sites: int) -> int:
        """On how many samples losses are measured, to leave time for a few candidates of every site."""
        return min(self.sweep_samples, self._affordable(0.5, _TRIES * max(sites, 1) / 2))

    def for_candidates(self, sites: int, samples: int) -> int:
        """How many candidates of every site there is time to measure on so many samples, at least one."""
        return max(1, self._affordable(0.5, max(sites, 1) / 2) // max(samples, 1))

    def for_calibration(self, batches: Sequence[Batch]) -> list[Batch]:
        """The calls that there is time for where no loss is measured and the caller did not say how many."""
        few = max(_FEWEST, min(self.samples, self._affordable(1.0, _REPAIRED)))
        return list(batches) if self.measured else first_batches(batches, few)

    def expected(self, samples: int, sites: Sequence[Site]) -> float:
        """Seconds of one core that planning these sites on so many samples is expected to take.

        Runs of the model at its pace; the fits and searches of every format; where losses are measured, half
        a run for each candidate.  The last two take no longer than the limit.
        """
        run = self.macs * self.pace
        known = min(samples, self.moment_samples)
        fits = sum(_FITS * max(1, self.ends) * seconds_to_fit(site) for site in sites)
        tried = min(samples, self.for_losses(len(sites))) if self.measured else 0
        losses = len(sites) * _CANDIDATES * tried * run / 2
        fits += len(sites) * _SEARCHED * self.searches * _SEARCH
        return (_RUNS * samples + _PASSES * known) * run + min(self.limit, fits + losses)

    def _affordable(self, share: float, passes: float) -> int:
        """Samples that so many forward passes can take, judged by multiply-adds so that results repeat."""
        samples = share * self.limit * RATE / (passes * max(self.macs, 1))
        return 2**31 if math.isinf(samples) else int(samples)


EFFORTS: Mapping[str, Effort] = {
    effort.name: effort
    for effort in (
        Effort("fast", 10.0, 128, 64, 6, 1, measured=False, rough=True, ends=0, samples=128),
        Effort("normal", 60.0, 512, 256, 12, 6, measured=True, rough=True),
        Effort("thorough", math.inf, 2**31, 256, 12, 12, measured=True, rough=False),
    )
}
THOROUGH = EFFORTS["thorough"]


def effort_named(name: str) -> Effort:
    """The effort of that name; raises `UsageError` for another."""
    if name not in EFFORTS:
        raise UsageError(f"effort={name!r} is not one of: {', '.join(EFFORTS)}{nearest(name, EFFORTS)}")
    return EFFORTS[name]


def seconds_to_fit(site: Site) -> float:
    """What a fit of the site that iterates in a metric takes: products of its weight with C and with G."""
    return _ITERATIONS * site.weights * (site.weights // site.o + site.o) / RATE


def first_samples(tapes: Sequence[Tape], samples: int) -> list[Tape]:
    """The first recorded runs that hold no more samples together, one at least."""
    taken: list[Tape] = []
    for tape in tapes:
        if taken and sum(t.batch_size for t in taken) + tape.batch_size > samples:
            break
        taken.append(tape)
    return taken


def first_batches(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """The first calls that hold so many samples together, one at least."""
    taken: list[Batch] = []
    for batch in batches:
        if taken and sum(held.size for held in taken) >= samples:
            break
        taken.append(batch)
    return taken


def said_of_few(batches: Sequence[Batch], what: str) -> str:
    """What is said of numbers that come from fewer samples than they should; empty where there are enough."""
    samples = sum(batch.size for batch in batches)
    if samples >= _FEW:
        return ""
    return f"{what} come from {samples} samples; give {_FEW} or more for {what} that hold"


@dataclass
class Allowance:
    """Seconds of one core, shared out among parts taken one after another, in proportion to `weights`.

    What a part leaves goes to those after it.  `clock` counts the processor time of this process.
    """

    seconds: float
    weights: dict[str, float]
    clock: Callable[[], float] = time.process_time
    _end: float = field(init=False)

    def __post_init__(self) -> None:
        self._end = self.clock() + self.seconds

    def take(self, name: str) -> Deadline:
        """The deadline of a part, which is then no longer waiting."""
        waiting = sum(self.weights.values())
        share = self.weights.pop(name) / waiting if waiting > 0 else 1.0
        left = max(0.0, self._end - self.clock())
        return Deadline(self.clock() + left * share, self.clock)


@dataclass(frozen=True)
class Deadline:
    """A moment of processor time."""

    end: float = math.inf
    clock: Callable[[], float] = time.process_time

    @property
    def left(self) -> float:
        """Seconds left, 0 when it is past."""
        return max(0.0, self.end - self.clock())

    def part(self, share: float) -> Deadline:
        """The deadline after that share of what is left."""
        return Deadline(self.clock() + self.left * share, self.clock)


NEVER = Deadline()
