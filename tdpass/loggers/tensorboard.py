"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tdpass.loggers.base import Logger, numbers, register_logger, shares
from tdpass.optional import optional
from tdpass.report import Report, TrainingRow


@register_logger
class TensorBoard(Logger):
    """Scalars per epoch, and the settings and the plan as text; `tensorboard --logdir FOLDER` shows them."""

    name: ClassVar[str] = "tensorboard"

    def start(self, folder: Path, facts: Mapping[str, object]) -> None:
        library: Any = optional("torch.utils.tensorboard", "tensorboard", "logging to TensorBoard")
        self._writer = library.SummaryWriter(str(folder / self.name))
        self._writer.add_text("settings", _table(facts))

    def row(self, row: TrainingRow) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()

    def finish(self, report: Report | None) -> None:
        if report is not None:
            self._writer.add_text("sites", _table({row.site: row.form for row in report.sites}))
            for name, value in shares(report).items():
                self._writer.add_scalar(f"result/{name}", value)
        self._writer.close()


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
