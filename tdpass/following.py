"""Work that tells how far it is: `progress(what, done, of)` is called now and then."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, of: int) -> None:
    """Progress that nobody looks at."""


def followed(what: str, parts: Collection[T], progress: Progress) -> Iterator[T]:
    """The parts of a piece of work, one after another, telling how many are done."""
    for done, part in enumerate(parts):
        progress(what, done, len(parts))
        yield part
    progress(what, len(parts), len(parts))
