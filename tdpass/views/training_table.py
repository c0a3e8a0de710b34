"""A training run for a terminal or a pipe."""

from __future__ import annotations

from tdpass.report import Report
from tdpass.views.tables import Column, Part, fitting, heading
from tdpass.views.training import CONTROL, CONTROL_IS, Stage, scores, stages
from tdpass.views.units import human, plain, seconds, small


def training_table(report: Report, width: int | None) -> list[Part]:
    """A line per stage, or two where the width is small; nothing where nothing was trained."""
    if not report.training:
        return []
    found = stages(report.training)
    scored = (
        [Column[Stage]("Score", lambda stage: stage.score, number=True)]
        if any(stage.score for stage in found)
        else []
    )
    constrained = any(stage.farthest for stage in found)
    time = Column[Stage]("Per epoch", lambda stage: seconds(stage.seconds), number=True)
    held = (
        [Column[Stage]("Held", lambda stage: human(stage.memory, "B"), number=True)]
        if any(stage.memory for stage in found)
        else []
    )
    one_line = [
        Column[Stage]("Stage", lambda stage: plain(stage.name)),
        Column[Stage]("Epochs", lambda stage: str(stage.epochs), number=True),
        Column[Stage]("First loss", lambda stage: stage.losses[0], number=True),
        Column[Stage]("Last loss", lambda stage: stage.losses[1], number=True),
        *scored,
        time,
        *held,
        *(
            [Column[Stage]("Residual", _residual, number=True), Column[Stage]("Of", _weight)]
            if constrained
            else ()
        ),
    ]
    two_lines = [
        Column[Stage]("Stage\nepochs", lambda stage: f"{plain(stage.name)}\n{stage.epochs}", least=8),
        Column[Stage]("Loss\nfirst, last", lambda stage: "\n".join(stage.losses), number=True),
        *scored,
        time,
        *(
            [
                Column[Stage](
                    "Residual\nof", lambda stage: f"{_residual(stage)}\n{_weight(stage)}".rstrip(), least=12
                )
            ]
            if constrained
            else ()
        ),
    ]
    return ["", heading("Training"), fitting((one_line, two_lines), found, width)[0]]


def scores_line(report: Report) -> str:
    """The scores of all networks; empty where there are none."""
    shown = ", ".join(
        f"{name} {value} ({CONTROL_IS})" if name == CONTROL else f"{name} {value}"
        for name, value in scores(report)
    )
    return f"score: {shown}" if shown else ""


def _residual(stage: Stage) -> str:
    return "" if stage.farthest is None else small(stage.farthest[1])


def _weight(stage: Stage) -> str:
    return "" if stage.farthest is None else plain(stage.farthest[0])
