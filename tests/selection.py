"""Which cases of a test run by default."""

from __future__ import annotations

from collections.abc import Iterable
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
