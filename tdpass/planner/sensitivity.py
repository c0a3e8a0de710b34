"""How much the network's output suffers from each candidate, measured without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tdpass.formats.base import Layer
from tdpass.planner.divergence import FittedDivergence, Outputs, Tally
from tdpass.tape import Playback, Tape


@dataclass
class Sweep:
    """The calibration runs, stopped just before a site; candidates for it are tried from there to the end.

    Sites are visited front to back, so that the part of the network before a site is seldom computed twice.  A site is tried
    on the first `samples` of the runs that call it; all others count as unchanged.
    """

    tapes: Sequence[Tape]
    divergence: FittedDivergence
    samples: int
    seconds: float = 0.0
    started: dict[int, tuple[Playback, Outputs]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        start = time.perf_counter()
        for index in self._first(range(len(self.tapes))):
            self._start(index)
        self.seconds = time.perf_counter() - start

    def loss(self, replaced: Mapping[str, Layer]) -> float:
        """Divergence of the outputs from the original's with those sites replaced and all others dense; 0 where no run calls them."""
        reached = [index for index, tape in enumerate(self.tapes) if any(name in tape.site_calls for name in replaced)]
        tally = Tally(self.divergence)
        with torch.no_grad():
            for index in self._first(reached):
                tape, (playback, reference) = self.tapes[index], self._start(index)
                playback.advance(min(tape.site_calls[name][0] for name in replaced if name in tape.site_calls))
                tally.add(reference, self.divergence.outputs(playback.fork(dict(replaced)).finish()))
        share = sum(self.tapes[index].batch_size for index in reached) / sum(tape.batch_size for tape in self.tapes)
        return tally.mean * share

    def _start(self, index: int) -> tuple[Playback, Outputs]:
        if index not in self.started:
            with torch.no_grad():
                self.started[index] = self.tapes[index].play(), self.divergence.outputs(self.tapes[index].play().finish())
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


def measure_losses(
    sweep: Sweep, layers: Sequence[Callable[[], Mapping[str, Layer]]], errors: Sequence[float], allowed: int
) -> list[float]:
    """Losses of candidates for one site: up to `allowed` measured, the rest from the loss measured at the nearest errors.

    Between two measured candidates the loss follows a power of the error; beyond them, its square (the loss of a small
    perturbation is quadratic).
    """
    order = sorted(range(len(errors)), key=lambda index: errors[index])
    count = max(1, min(allowed, len(order)))
    picked = sorted({round(k * (len(order) - 1) / max(count - 1, 1)) for k in range(count)}) if count > 1 else [len(order) // 2]
    known = {order[position]: max(sweep.loss(layers[order[position]]()), 0.0) for position in picked}
    points = sorted((errors[index], loss) for index, loss in known.items())
    return [known[index] if index in known else _interpolate(points, errors[index]) for index in range(len(errors))]


def _interpolate(points: Sequence[tuple[float, float]], error: float) -> float:
    tiny = 1e-12
    below = [point for point in points if point[0] <= error]
    above = [point for point in points if point[0] > error]
    if below and above:
        (e0, l0), (e1, l1) = below[-1], above[0]
        share = (math.log(error + tiny) - math.log(e0 + tiny)) / (math.log(e1 + tiny) - math.log(e0 + tiny))
        return math.exp((1 - share) * math.log(l0 + tiny) + share * math.log(l1 + tiny))
    e, loss = below[-1] if below else above[0]
    return loss * (error / e) ** 2 if e > 0 else loss
