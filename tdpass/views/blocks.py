"""Sites that belong together, by their names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

_BLOCKS, _ALWAYS, _MEAN = 60, 12, 3


def blocks(names: Sequence[str], most: int = _BLOCKS) -> list[tuple[str, list[int]]]:
    """Names one after another that begin alike, as the name of their block and their places.

    The finest of at most `most` blocks that hold three names or more on average, where there are more than a
    dozen.
    """
    most = min(most, max(_ALWAYS, len(names) // _MEAN))
    paths = [re.split(r"[./]", name) for name in names]
    deepest = max((len(path) for path in paths), default=1) - 1
    for depth in range(deepest, 0, -1):
        found = list(_together([".".join(path[: min(depth, len(path) - 1)]) for path in paths]))
        if len(found) <= most and len(found) < len(names):
            return found
    return [("", list(range(len(names))))]


def _together(keys: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    for key, group in itertools.groupby(range(len(keys)), key=keys.__getitem__):
        yield key, list(group)
