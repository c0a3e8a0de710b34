"""Which cases of a test run by default."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """The cases as parameters, those outside `fast` marked slow; a case is a value or a tuple of them."""
    listed, kept = list(cases), list(fast)
    unknown = [case for case in kept if case not in listed]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of the cases: {listed}")
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in kept else pytest.mark.slow
        )
        for case in listed
    ]


MANY, VERY_MANY = 10, 60


def thin(items: Sequence[pytest.Item]) -> None:
    """Mark cases of tests that have many as slow: every second one by chance, of very many two in three.

    Chance is a checksum of the case's name, so that the choice is the same each time and is no pattern in the
    parameters.
    """
    fast = [item for item in items if item.get_closest_marker("slow") is None]
    cases = Counter(map(_test, fast))
    for item in fast:
        count = cases[_test(item)]
        kept_of = 1 + (count >= MANY) + (count >= VERY_MANY)
        if zlib.crc32(item.nodeid.encode()) % kept_of:
            item.add_marker(pytest.mark.slow)


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]
