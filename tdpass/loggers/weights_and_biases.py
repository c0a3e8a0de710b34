"""Weights & Biases: a run of the project `tdpass`, or of that which `$WANDB_PROJECT` names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tdpass.loggers.base import Logger, numbers, register_logger, shares
from tdpass.optional import optional
from tdpass.report import Report, TrainingRow


@register_logger
class WeightsAndBiases(Logger):
    """Scalars per epoch, the settings as the run's configuration and the result as its summary."""

    name: ClassVar[str] = "wandb"

    def start(self, folder: Path, facts: Mapping[str, object]) -> None:
        library: Any = optional("wandb", "wandb", "logging to Weights & Biases")
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", "tdpass"),
            name=folder.name or None,
            dir=str(folder),
            config={name: str(value) for name, value in facts.items()},
        )

    def row(self, row: TrainingRow) -> None:
        self._run.log({f"{row.stage}/epoch": row.epoch, **numbers(row)})

    def finish(self, report: Report | None) -> None:
        if report is not None:
            self._run.summary.update({f"result/{name}": value for name, value in shares(report).items()})
        self._run.finish(exit_code=1 if report is None else 0)
