"""Progress of steps that take more than a moment.

Bars where a person looks on, lines now and then elsewhere.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from typing_extensions import Self

from tdpass.following import Progress
from tdpass.views.units import plain

if TYPE_CHECKING:
    import rich.progress

PATIENCE = 2.0
BETWEEN_LINES = 10.0
_SHARE = 0.1  # of the time since the beginning, which lines are apart at least


class ProgressBars:
    """The library's `progress(what, done, of)` callback: a bar appears once its step has lasted two seconds.

    Where the file is no terminal, a line with the time that is left is written then, and every ten seconds
    (later on every tenth of the time that went by), instead; nothing where it is not `shown`.
    """

    def __init__(self, file: TextIO, shown: bool = True) -> None:
        self._file, self._shown = file, shown
        self._since: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._bars: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the bars away until the next call, so that a line may be written."""
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
        started, first = self._since.setdefault(what, (now, done))
        since, made = now - started, done - first
        if since < PATIENCE:
            return
        if self._file.isatty():
            self._bar(what, done, of)
        elif now - self._said.get(what, -math.inf) >= max(BETWEEN_LINES, _SHARE * since):
            self._said[what] = now
            left = f", about {max(1, round(since * (of - done) / made))} s left" if made and of else ""
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


@contextmanager
def shown(wanted: Progress | bool) -> Iterator[Progress]:
    """What is called as work goes on: the caller's own, bars on stderr, or nothing."""
    if not isinstance(wanted, bool):
        yield wanted
        return
    with ProgressBars(sys.stderr, shown=wanted) as bars:
        yield bars


def _bars(file: TextIO) -> rich.progress.Progress:
    from rich.console import Console  # noqa: PLC0415 - takes a tenth of a second
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars  # noqa: PLC0415

    words = TextColumn("{task.description}", markup=False)
    return Bars(
        words,
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=file),
        transient=True,
    )
