"""Records whose fields stand, in a document, among those of the record that holds them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

import msgspec


class Flattened:
    """A dataclass whose fields stand, in a document, among those of the record that holds it.

    A default is not written.
    """


Record = dict[str, Any]


def nested(tree: Any, hint: Any) -> Any:
    """What a file says, nested as a value of that type is."""
    return _reshaped(tree, hint, _gather)


def flat(tree: Any, hint: Any) -> Any:
    """The tree of a value of that type, laid out as in a file."""
    return _reshaped(tree, hint, _spread)


def flat_without_defaults(tree: Any, hint: Any) -> Any:
    """`flat` without the defaults of flattened records."""
    return _reshaped(tree, hint, _without_defaults)


def place_in_file(reason: str, hint: Any) -> str:
    """A complaint about a value of that type, its place as the file has it."""
    for name in _names(hint):
        reason = re.sub(rf"\.{name}(?=[.`])", "", reason)
    return reason


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(cls, include_extras=True)


def _reshaped(tree: Any, hint: Any, change: Callable[[Record, str, type], Record]) -> Any:
    """The tree with every record that holds a `Flattened` one changed."""
    if not _names(hint):
        return tree
    arms = get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(tree, dict):
        hints = hints_of(hint)
        record = {key: _reshaped(value, hints.get(key), change) for key, value in tree.items()}
        for name in _held(hint):
            record = change(record, name, hints[name])
        return record
    if isinstance(tree, list | tuple) and arms:
        return [_reshaped(item, arms[0], change) for item in tree]
    if isinstance(tree, dict) and len(arms) > 1:
        return {key: _reshaped(value, arms[1], change) for key, value in tree.items()}
    return tree


def _gather(record: Record, name: str, part: type) -> Record:
    keys = hints_of(part)
    return {
        **{key: value for key, value in record.items() if key not in keys},
        name: {key: record[key] for key in keys if key in record},
    }


def _spread(record: Record, name: str, part: type) -> Record:
    flat: Record = {}
    for key, value in record.items():
        flat.update(value if key == name else {key: value})
    return flat


def _without_defaults(record: Record, name: str, part: Any) -> Record:
    defaults = {
        field.name: msgspec.to_builtins(field.default)
        for field in fields(part)
        if field.default is not MISSING
    }
    said = {
        key: value for key, value in record[name].items() if key not in defaults or value != defaults[key]
    }
    return _spread({**record, name: said}, name, part)


@cache
def _held(cls: type) -> tuple[str, ...]:
    return tuple(
        name for name, hint in hints_of(cls).items() if isinstance(hint, type) and issubclass(hint, Flattened)
    )


@cache
def _names(hint: Any) -> frozenset[str]:
    """Names of the fields, anywhere in a value of that type, that hold `Flattened` records."""
    if is_dataclass(hint) and isinstance(hint, type):
        return frozenset(_held(hint)).union(*map(_names, hints_of(hint).values()))
    return frozenset[str]().union(*map(_names, get_args(hint)))
