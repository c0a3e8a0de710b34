"""A named table of implementations; the only way formats, passes and targets become known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from tdpass.errors import UsageError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str]) -> str:
    """What was probably meant, as a part of a sentence; empty where no name is near."""
    typed = name.lower()
    alike = [known for known in names if known[:1] == typed[:1]]  # a slip is seldom in the first letter
    found = difflib.get_close_matches(typed, alike, n=1, cutoff=0.65)
    return f" (did you mean {found[0]!r}?)" if found else ""


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
