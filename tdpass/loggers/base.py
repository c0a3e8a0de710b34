"""What a logger is told of a training run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

from tdpass.registry import Registry
from tdpass.report import Report, TrainingRow


class Logger(ABC):
    """A place where a run is shown; a subclass per file, registered with `register_logger`."""

    name: ClassVar[str]

    @abstractmethod
    def start(self, folder: Path, facts: Mapping[str, object]) -> None:
        """Begin, or go on with, the run in that folder; raises `UsageError` where a library is not there."""

    @abstractmethod
    def row(self, row: TrainingRow) -> None:
        """An epoch that is done."""

    @abstractmethod
    def finish(self, report: Report | None) -> None:
        """The end: with the report of what came out, or None where the run failed."""


LOGGERS: Registry[type[Logger]] = Registry("logger")


def register_logger(cls: type[Logger]) -> type[Logger]:
    """Class decorator: make a logger known by its `name`."""
    return LOGGERS.add(cls.name, cls)


def _failed(logger: Logger, running: Sequence[Logger]) -> None:
    """End a logger that is still among those that run."""
    if any(other is logger for other in running):
        logger.finish(None)


@contextmanager
def started(
    wanted: Sequence[str | Logger], folder: Path | None, facts: Mapping[str, object]
) -> Iterator[list[Logger]]:
    """Loggers that are running, by name or as given.

    A block that fails, or leaves some in the list, ends them without a report.
    """
    with ExitStack() as stack:
        running: list[Logger] = []
        for entry in wanted:
            logger = LOGGERS.get(entry)() if isinstance(entry, str) else entry
            logger.start(folder or Path(), facts)
            running.append(logger)
            stack.callback(_failed, logger, running)
        yield running


def numbers(row: TrainingRow) -> dict[str, float]:
    """What an epoch is shown by: `stage/loss` and the like."""
    found = {"loss": row.loss, "rate": row.rate, "seconds": row.seconds}
    if row.score is not None:
        found["score"] = row.score
    found |= {f"residual {name}": value for name, value in row.residuals.items()}
    return {f"{row.stage}/{name}": value for name, value in found.items()}


def shares(report: Report) -> dict[str, float]:
    """The result as parts of the original, by measure."""
    return {} if report.final is None else dict(report.final.shares(report.original))
