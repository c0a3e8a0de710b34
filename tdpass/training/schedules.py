"""How a number changes while training goes on: learning rates and penalties."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tdpass.documents import Amount, Document, Positive, Share
from tdpass.errors import UsageError


class Schedule(Protocol):
    """A value for every point of a phase."""

    def value(self, progress: float) -> float:
        """The value when the share `progress` in [0, 1] of the phase is over."""


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    start: Amount

    def value(self, progress: float) -> float:
        return self.start


@dataclass(frozen=True)
class Geometric:
    """From `start` to `end` by equal factors, reached at the share `until` of the phase (multi-rho)."""

    start: Positive
    end: Positive
    until: Positive = 1.0

    def value(self, progress: float) -> float:
        return float(self.start * (self.end / self.start) ** min(1.0, progress / self.until))


GROWING = Geometric(3.0, 300.0)  # of rho, for pulls that are decoupled: loose at first, tight at the end


@dataclass(frozen=True)
class Cosine:
    """From `start` down to `floor * start` along half a cosine, after a linear `warm_up`.

    `warm_up` is a share of the phase.
    """

    start: Amount
    floor: Amount = 0.0
    warm_up: Share = 0.0

    def value(self, progress: float) -> float:
        if progress < self.warm_up:
            return self.start * progress / self.warm_up
        done = (progress - self.warm_up) / max(1e-12, 1 - self.warm_up)
        return self.start * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True)
class Steps:
    """`start`, multiplied by `factor` at each of the shares `at` of the phase."""

    start: Amount
    factor: Amount
    at: tuple[Share, ...]

    def value(self, progress: float) -> float:
        return self.start * self.factor ** sum(progress >= share for share in self.at)


_KINDS: dict[str, type[Constant | Geometric | Cosine | Steps]] = {
    "constant": Constant,
    "geometric": Geometric,
    "cosine": Cosine,
    "steps": Steps,
}
ScheduleSpec = float | Schedule | Mapping[str, object]


def as_schedule(spec: ScheduleSpec, noun: str) -> Schedule:
    """Read `0.01`, a schedule, or `{"cosine": {"start": 0.01, "floor": 0.02}}` as a recipe has it.

    Raises `UsageError`.
    """
    if isinstance(spec, Mapping):
        ((kind, options),) = spec.items() if len(spec) == 1 else ((None, None),)
        if kind not in _KINDS or not isinstance(options, Mapping):
            raise UsageError(
                f"{noun} {dict(spec)!r} is no schedule; write a number or {{KIND: {{start: ...}}}}, KIND "
                f"one of: {', '.join(_KINDS)}"
            )
        made: Schedule = Document(
            f"{kind} schedule", _KINDS[kind], UsageError, "see the guide to training"
        ).check(options, f"{noun} {dict(spec)!r}")
        return made
    if isinstance(spec, bool) or (isinstance(spec, int | float) and not (math.isfinite(spec) and spec >= 0)):
        raise UsageError(f"{noun}={spec!r} is not a number of at least 0")
    return Constant(float(spec)) if isinstance(spec, int | float) else spec
