"""Damage for files of any kind, drawn from a seed: the same files each time."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3.5,
    -0.5,
    2**31,
    2**63,
    -(2**63),
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "1",
    [],
    {},
    [[]],
    {"a": 1},
    [1, 2],
    ["a"],
    "\0" * 9,
    "../..",
)


def damaged_bytes(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Flipped, cut, lengthened, removed and repeated bytes."""
    draw = random.Random(seed)
    for number in range(count):
        place, size = draw.randrange(len(whole)), draw.choice((1, 2, 8, 64))
        kinds = (
            whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :],
            whole[:place],
            whole[:place] + whole[place + size :],
            whole[:place] + draw.randbytes(size) + whole[place + size :],
            whole[:place] + whole[place : place + size] * 2 + whole[place + size :],
        )
        yield kinds[number % len(kinds)]


def damaged_trees(tree: Any, count: int, seed: int = 0) -> Iterator[Any]:
    """A value of another type or size, a key removed, added or renamed, or a level too many."""
    draw = random.Random(seed)
    for number in range(count):
        twin = copy.deepcopy(tree)
        holder, key = draw.choice(list(_places(twin)))
        _CHANGES[number % len(_CHANGES)](holder, key, draw)
        yield twin


def as_json(tree: Any) -> str:
    """The tree as JSON, as far as Python writes it."""
    return json.dumps(tree, indent=1)


def texts(tree: Any, count: int, seed: int = 0) -> Iterator[str]:
    """JSON of damaged trees, of keys given twice, and of depths that no reader's stack holds."""
    for twin in damaged_trees(tree, count, seed):
        yield as_json(twin)
    whole = as_json(tree)
    yield "[" * 100_000 + "]" * 100_000
    yield whole.replace("{", '{"a": ' * 2_000 + "{}" + "}" * 2_000 + ', "x": {', 1)
    first, comma, rest = whole.partition(",")
    yield first + "," + first[1:] + comma + rest


def _replace(holder: Any, key: Any, draw: random.Random) -> None:
    holder[key] = copy.deepcopy(draw.choice(_VALUES))


def _remove(holder: Any, key: Any, draw: random.Random) -> None:
    del holder[key]


def _add(holder: Any, key: Any, draw: random.Random) -> None:
    if isinstance(holder, dict):
        holder[f"{key}{draw.randrange(9)}"] = holder[key]
    else:
        holder.insert(key, holder[key])


def _negate(holder: Any, key: Any, draw: random.Random) -> None:
    value = holder[key]
    holder[key] = -value - 1 if isinstance(value, int | float) else str(value)


def _nest(holder: Any, key: Any, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 200))):
        holder[key] = [holder[key]]


_CHANGES: tuple[Callable[[Any, Any, random.Random], None], ...] = (
    _replace,
    _remove,
    _replace,
    _add,
    _negate,
    _nest,
    _replace,
)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys: Any = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])
