"""A named table of implementations; the only way formats, passes and targets become known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from tdpass.errors import UsageError

T = TypeVar("T")
_NEAR = 8


def nearest(name: str, names: Iterable[str]) -> str:
    """What was probably meant, as a part of a sentence; empty where no name is near."""
    typed = name.lower()
    alike = [known for known in names if known[:1] == typed[:1]]  # a slip is seldom in the first letter
    near = difflib.get_close_matches(typed, alike, n=_NEAR, cutoff=0.65)
    # of names that are equally near, the one that is spelt alike for longest
    found = max(near, key=lambda known: _likeness(typed, known), default="")
    return f" (did you mean {found!r}?)" if found else ""


def _likeness(typed: str, known: str) -> tuple[float, int]:
    alike = [mine == theirs for mine, theirs in zip(typed, known, strict=False)]
    return difflib.SequenceMatcher(None, known, typed).ratio(), [*alike, False].index(False)


class Registry(Generic[T]):
    """Names mapped to values; a duplicate or an unknown name is an error that lists the known ones.

    >>> shapes = Registry[int]("shape")
    >>> shapes.add("square", 4)
    4
    """

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._entries: dict[str, T] = {}

    def add(self, name: str, value: T) -> T:
        """Register `value`; raises `UsageError` when the name is taken."""
        if name in self._entries:
            raise UsageError(
                f"{self._noun} {name!r} is registered twice: {self._entries[name]!r} and {value!r}"
            )
        self._entries[name] = value
        return value

    def get(self, name: str) -> T:
        """Return the entry; raises `UsageError` listing the known names when there is none."""
        try:
            return self._entries[name]
        except KeyError:
            raise UsageError(
                f"unknown {self._noun} {name!r}{nearest(name, self.names())}; known: "
                f"{', '.join(self.names())}"
            ) from None

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[T]:
        return (self._entries[name] for name in self.names())

    def __len__(self) -> int:
        return len(self._entries)
