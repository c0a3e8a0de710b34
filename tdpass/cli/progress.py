"""Progress bars for steps that take more than a moment."""

from __future__ import annotations

import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import Self

from tdpass.views.units import plain

PATIENCE = 2.0


class ProgressBars:
    """The library's `progress(what, done, of)` callback: a bar appears once its step has lasted two seconds."""

    def __init__(self, file: TextIO, shown: bool) -> None:
        self._shown, self._running = shown, False
        self._since: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        words = TextColumn("{task.description}", markup=False)
        self._bars = Progress(words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(file=file), transient=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._bars.stop()

    def __call__(self, what: str, done: int, of: int) -> None:
        """Say that `done` of `of` parts of a step are finished."""
        if not self._shown:
            return
        if of and done >= of:
            self._end(what)
            return
        since = time.monotonic() - self._since.setdefault(what, time.monotonic())
        if what not in self._tasks:
            if since < PATIENCE:
                return
            self._bars.start()
            self._running = True
            self._tasks[what] = self._bars.add_task(plain(what), total=of or None)
        self._bars.update(self._tasks[what], completed=done, total=of or None)

    def _end(self, what: str) -> None:
        self._since.pop(what, None)
        if what in self._tasks:
            self._bars.remove_task(self._tasks.pop(what))
