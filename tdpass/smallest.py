"""The smallest model that keeps what a user's own metric says of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tdpass.artifact import Artifact
from tdpass.errors import BudgetError, DifferenceError, UsageError

METRIC = "metric"
_SHARES = 100  # budgets are tried in hundredths of the original


@dataclass(frozen=True)
class Kept:
    """A score of models, of which more is better, and how much of the dense model's may be lost."""

    metric: Callable[[Any], float]
    max_loss: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise UsageError(
                f"metric={self.metric!r} is no function; give one of the model that returns a number, of "
                "which more is better"
            )
        if not math.isfinite(self.max_loss) or self.max_loss < 0:
            raise UsageError(
                f"max_loss={self.max_loss!r} must be a number of at least 0, in the units of the metric"
            )

    def score(self, model: object) -> float:
        """What the metric says; raises `UsageError` where that is no finite number."""
        value = float(self.metric(model))
        if not math.isfinite(value):
            raise UsageError(
                f"the metric says {value} of a model; it must return a finite number, of which more is better"
            )
        return value


def smallest(
    attempt: Callable[[float], Artifact], dense: object, kept: Kept, say: Callable[[int, int], None]
) -> Artifact:
    """The artifact of least budget whose score is at most `max_loss` below the dense model's.

    It is found by bisection over hundredths of the original. `attempt(share)` compresses to that share.  What
    scores worse at a larger budget than at a smaller one is not looked for.  Raises `BudgetError` where no
    smaller model keeps the score; the last one tried is in its `.artifact`.
    """
    least = kept.score(dense) - kept.max_loss
    best: Artifact | None = None
    seen: Artifact | None = None
    low, high = 0, _SHARES
    rounds = math.ceil(math.log2(_SHARES))
    for step in range(rounds):
        say(step, rounds)
        middle = (low + high) // 2
        if middle in (low, high):
            break
        found = _attempted(attempt, middle / _SHARES)
        score = None if found is None else kept.score(found.model)
        seen = found or seen
        if found is not None and score is not None and score >= least:
            found.report.checks[METRIC] = score
            best, high = found, middle
        else:
            low = middle
    say(rounds, rounds)
    if best is not None:
        before = f"of the dense model it is {least + kept.max_loss:.6g}"
        best.report.note(
            f"the smallest budget, in hundredths, at which the metric is at least {least:.6g}; {before}"
        )
        return best
    error = BudgetError(
        f"no smaller model keeps the metric at {least:.6g} or more; allow a larger max_loss, or train: see "
        "docs/training.md"
    )
    error.artifact = seen
    raise error


def _attempted(attempt: Callable[[float], Artifact], share: float) -> Artifact | None:
    try:
        return attempt(share)
    except (BudgetError, DifferenceError):
        return None
