"""One folder, one run: what it was started with, so that another run is not taken for its continuation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from tdpass.documents import Document, register_document
from tdpass.errors import UsageError
from tdpass.files import write_text
from tdpass.training.placement import world

Fact = str | int | float | bool | None

_STARTED = register_document(
    Document(
        "start of a training run", dict[str, Fact], UsageError, "train from the beginning in another folder"
    )
)


def check_same_run(folder: Path, name: str, facts: Mapping[str, object], resume: bool) -> None:
    """Write down the facts of a new run as `folder/name`, in a folder that is made where there is none.

    Raises `UsageError` where a run to go on with was started with others.
    """
    path, given = folder / name, plain_facts(facts)
    if resume and path.exists():
        known = _STARTED.load(path)
        found = {
            key: (known.get(key), given.get(key))
            for key in sorted({*known, *given})
            if known.get(key) != given.get(key)
        }
        if found:
            differences = ", ".join(f"{key}={before!r}, not {now!r}" for key, (before, now) in found.items())
            raise UsageError(
                f"{folder} holds a run with {differences}; resume it with what it was started with, or give "
                "another folder"
            )
    elif world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, _STARTED.text(given) + "\n")


def plain_facts(facts: Mapping[str, object]) -> dict[str, Fact]:
    """The facts as numbers and texts, each under its place, as `method.keep`."""
    return dict(_flat("", facts))


def _flat(place: str, value: object) -> Iterator[tuple[str, Fact]]:
    """Every number, text or truth in a value with its place in it, as `method.keep`.

    Of an object that is none of these, its type.
    """
    if is_dataclass(value) and not isinstance(value, type):
        inner: Iterator[tuple[str, object]] = (
            (entry.name, getattr(value, entry.name)) for entry in fields(value) if entry.init
        )
    elif isinstance(value, Mapping):
        inner = ((str(key), entry) for key, entry in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        inner = ((str(index), entry) for index, entry in enumerate(value))
    else:
        yield (
            place,
            value if value is None or isinstance(value, str | int | float | bool) else type(value).__name__,
        )
        return
    for key, entry in inner:
        yield from _flat(f"{place}.{key}" if place else key, entry)
