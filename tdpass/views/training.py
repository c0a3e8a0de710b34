"""What every view shows of a training run.

Its stages, its scores, and how far each weight was from its constraint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tdpass.report import Report, TrainingRow
from tdpass.views.units import score, small

CONTROL = "control"
CONTROL_IS = "the dense network, trained as long"
_SCORE = "score_"
_REFERENCES = {"control": CONTROL_IS, "dense": "the dense network"}
_DESTROYED = 0.5  # share of the score of the network it is held against


@dataclass(frozen=True)
class Stage:
    """The epochs of one stage, of which there is at least one."""

    name: str
    rows: Sequence[TrainingRow]

    @property
    def epochs(self) -> int:
        """How many epochs it took, those included that the report has no row of."""
        return max(row.epoch for row in self.rows) + 1

    @property
    def losses(self) -> tuple[str, str]:
        """The first and the last loss."""
        return small(self.rows[0].loss), small(self.rows[-1].loss)

    @property
    def score(self) -> str:
        """What `evaluate` said last; empty where it never did."""
        return next((score(row.score) for row in reversed(self.rows) if row.score is not None), "")

    @property
    def seconds(self) -> float:
        """Mean time of an epoch."""
        return sum(row.seconds for row in self.rows) / len(self.rows)

    @property
    def memory(self) -> int:
        """Bytes that it held from step to step at most; 0 where nobody knows."""
        return max(row.memory for row in self.rows)

    @property
    def farthest(self) -> tuple[str, float] | None:
        """The weight of largest residual, and that residual, in the last epoch that has some."""
        last = next((row.residuals for row in reversed(self.rows) if row.residuals), None)
        return None if last is None else max(last.items(), key=lambda item: _size(item[1]))


@dataclass(frozen=True)
class Course:
    """The residuals of one weight, each with its place in the run."""

    name: str
    points: Sequence[tuple[int, float]]

    @property
    def last(self) -> float:
        """Where it ended."""
        return self.points[-1][1]


def stages(rows: Sequence[TrainingRow]) -> list[Stage]:
    """The rows by stage, in the order in which the stages began."""
    return [
        Stage(name, [row for row in rows if row.stage == name])
        for name in dict.fromkeys(row.stage for row in rows)
    ]


def starts(found: Sequence[Stage]) -> dict[str, int]:
    """Epochs of the run before each stage.

    The control starts from the dense network, beside what follows the pre-training.
    """
    places: dict[str, int] = {}
    place = 0
    for stage in found:
        if stage.name != CONTROL:
            places[stage.name] = place
            place += stage.epochs
    places[CONTROL] = next((stage.epochs for stage in found if stage.name == "pretrain"), 0)
    return places


def courses(rows: Sequence[TrainingRow]) -> list[Course]:
    """The residuals of every weight, those that ended farthest from their constraint first."""
    before = starts(stages(rows))
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.residuals.items():
            found.setdefault(name, []).append((before[row.stage] + row.epoch + 1, value))
    return sorted(
        (Course(name, points) for name, points in found.items()), key=lambda course: -_size(course.last)
    )


def scores(report: Report) -> list[tuple[str, str]]:
    """What `test` said of each network, in words; nothing where nothing was trained."""
    if not report.training:
        return []
    named = {
        name.removeprefix(_SCORE): value for name, value in report.checks.items() if name.startswith(_SCORE)
    }
    if all(row.stage != "finetune" for row in report.training):
        named.pop("before_finetuning", None)  # it is the final one
    return [
        (name.replace("_", " ").replace("finetuning", "fine-tuning"), score(value))
        for name, value in named.items()
    ]


def destroyed(report: Report) -> str:
    """What training did to a network that answers far worse than it would have without, more being better.

    Empty where it does not.
    """
    final = report.checks.get(f"{_SCORE}final")
    before, by = next(
        (
            (value, words)
            for name, words in _REFERENCES.items()
            if (value := report.checks.get(f"{_SCORE}{name}")) is not None
        ),
        (0.0, ""),
    )
    if not report.training or final is None or not 0 <= final < _DESTROYED * before:
        return ""
    return (
        f"training destroyed this network: it scores {score(final)}, {by} {score(before)}; keep "
        "more, or train it in smaller steps"
    )


def other_checks(report: Report) -> dict[str, float]:
    """The checks that `scores` leaves out."""
    return {
        name: value
        for name, value in report.checks.items()
        if not (report.training and name.startswith(_SCORE))
    }


def _size(residual: float) -> float:
    return residual if math.isfinite(residual) else math.inf
