"""How much the network's output suffers from each candidate, measured without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.planner.divergence import FittedDivergence, Outputs, Tally
from tdpass.planner.effort import NEVER, Deadline
from tdpass.tape import Playback, Tape


@dataclass
class Sweep:
    """The calibration runs, stopped just before a site; candidates for it are tried from there to the end.

    Sites are visited front to back, so that the part of the network before a site is seldom computed twice.
    A site is tried on the first `samples` of the runs that call it; all others count as unchanged.
    """

    tapes: Sequence[Tape]
    divergence: FittedDivergence
    samples: int
    seconds: float = 0.0
    started: dict[int, tuple[Playback, Outputs]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        start = time.process_time()
        for index in self._first(range(len(self.tapes))):
            self._start(index)
        self.seconds = time.process_time() - start

    def loss(self, replaced: Mapping[str, Layer]) -> float:
        """Divergence of the outputs from the original's with those sites replaced and all others dense.

        0 where no run calls them.
        """
        reached = [
            index
            for index, tape in enumerate(self.tapes)
            if any(name in tape.site_calls for name in replaced)
        ]
        tally = Tally(self.divergence)
        with torch.no_grad():
            for index in self._first(reached):
                tape, (playback, reference) = self.tapes[index], self._start(index)
                playback.advance(
                    min(tape.site_calls[name][0] for name in replaced if name in tape.site_calls)
                )
                tally.add(reference, self.divergence.outputs(playback.fork(dict(replaced)).finish()))
        share = sum(self.tapes[index].batch_size for index in reached) / sum(
            tape.batch_size for tape in self.tapes
        )
        return tally.mean * share

    def _start(self, index: int) -> tuple[Playback, Outputs]:
        if index not in self.started:
            with torch.no_grad():
                self.started[index] = (
                    self.tapes[index].play(),
                    self.divergence.outputs(self.tapes[index].play().finish()),
                )
        return self.started[index]

    def _first(self, indices: Sequence[int]) -> list[int]:
        """As many of these runs as hold `samples` samples, at least one."""
        taken: list[int] = []
        held = 0
        for index in indices:
            held += self.tapes[index].batch_size
            if taken and held > self.samples:
                break
            taken.append(index)
        return taken

    @property
    def tried_on(self) -> int:
        """How many samples a site that all runs call is tried on."""
        return sum(self.tapes[index].batch_size for index in self._first(range(len(self.tapes))))

    def place(self, name: str) -> int:
        """Where the first run calls a site first."""
        return self.tapes[0].site_calls.get(name, (0,))[0]

    def seconds_from(self, names: Iterable[str]) -> float:
        """Processor time that one candidate for these sites takes.

        That of the part of the run behind the first of them.
        """
        tape = self.tapes[0]
        first = min((tape.site_calls[name][0] for name in names if name in tape.site_calls), default=0)
        return self.seconds * (1 - first / max(len(tape.calls), 1))


@dataclass(frozen=True)
class Loss:
    """The expected increase of the divergence, and whether it was measured."""

    value: float
    measured: bool


def measure_losses(
    sweep: Sweep,
    layers: Sequence[Callable[[], Mapping[str, Layer]]],
    errors: Sequence[float],
    allowed: int,
    deadline: Deadline = NEVER,
) -> list[Loss]:
    """Losses of candidates for one site.

    Up to `allowed` measured, the rest from the loss measured at the nearest errors. The one of middle error
    comes first, then those that are evenly spread, until the deadline.  Between two measured candidates the
    loss follows a power of the error; beyond them, its square (the loss of a small perturbation is
    quadratic). A loss that is no finite number is taken for infinite.
    """
    order = sorted(range(len(errors)), key=lambda index: errors[index])
    count = max(1, min(allowed, len(order)))
    middle = len(order) // 2
    picked = [round(k * (len(order) - 1) / (count - 1)) for k in range(count)] if count > 1 else [middle]
    known: dict[int, float] = {}
    for position in dict.fromkeys(
        [min(picked, key=lambda position: abs(position - middle)), picked[0], picked[-1], *picked]
    ):
        if known and deadline.left <= 0:
            break
        loss = sweep.loss(layers[order[position]]())
        known[order[position]] = max(loss, 0.0) if math.isfinite(loss) else math.inf
    points = sorted((errors[index], loss) for index, loss in known.items() if math.isfinite(loss))
    return [
        Loss(known[index], True) if index in known else Loss(between(points, errors[index]), False)
        for index in range(len(errors))
    ]


def estimate_losses(metric: Metric, weight: Tensor, errors: Sequence[float]) -> list[Loss]:
    """Losses from the metric alone.

    Half of `|| G^1/2 (W - What) C^1/2 ||^2`, the second-order term of the divergence. Needs G, the
    Gauss-Newton metric of the site's output.
    """
    whole = metric.square(weight.double().flatten(1))
    return [Loss(0.5 * error**2 * whole, False) for error in errors]


def between(points: Sequence[tuple[float, float]], error: float) -> float:
    """The loss at an error, from errors with losses, ascending: a power of it, beyond them its square."""
    tiny = 1e-12
    if not points:
        return math.inf
    below = [point for point in points if point[0] <= error]
    above = [point for point in points if point[0] > error]
    if below and above:
        (e0, l0), (e1, l1) = below[-1], above[0]
        share = (math.log(error + tiny) - math.log(e0 + tiny)) / (math.log(e1 + tiny) - math.log(e0 + tiny))
        return math.exp((1 - share) * math.log(l0 + tiny) + share * math.log(l1 + tiny))
    e, loss = below[-1] if below else above[0]
    return loss * (error / e) ** 2 if e > 0 else loss
