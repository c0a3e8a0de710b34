"""Progress of steps that take more than a moment.

Bars where a person looks on, lines now and then elsewhere.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, TextIO

from typing_extensions import Self

from tdpass.views.units import plain

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 2.0
BETWEEN_LINES = 10.0


class ProgressBars:
    """The library's `progress(what, done, of)` callback: a bar appears once its step has lasted two seconds.

    Where the file is no terminal, a line with the time that is left is written then, and every ten seconds,
    instead; nothing where it is not `shown`.
    """

    def __init__(self, file: TextIO, shown: bool = True) -> None:
        self._file, self._shown = file, shown
        self._since: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bars: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    def __call__(self, what: str, done: int, of: int) -> None:
        """Say that `done` of `of` parts of a step are finished."""
        if not self._shown:
            return
        if of and done >= of:
            self._end(what)
            return
        now = time.monotonic()
        since = now - self._since.setdefault(what, now)
        if since < PATIENCE:
            return
        if self._file.isatty():
            self._bar(what, done, of)
        elif now - self._said.get(what, -math.inf) >= BETWEEN_LINES:
            self._said[what] = now
            left = f", about {max(1, round(since * (of - done) / done))} s left" if done and of else ""
            self._file.write(f"{plain(what)}: {done} of {of or '?'}{left}\n")
            self._file.flush()

    def _bar(self, what: str, done: int, of: int) -> None:
        if self._bars is None:
            self._bars = _bars(self._file)
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(plain(what), total=of or None)
        self._bars.update(self._tasks[what], completed=done, total=of or None)

    def _end(self, what: str) -> None:
        self._since.pop(what, None)
        self._said.pop(what, None)
        if what in self._tasks and self._bars is not None:
            self._bars.remove_task(self._tasks.pop(what))


def _bars(file: TextIO) -> Progress:
    from rich.console import Console  # noqa: PLC0415 - takes a tenth of a second
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    words = TextColumn("{task.description}", markup=False)
    return Progress(
        words,
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=file),
        transient=True,
    )
