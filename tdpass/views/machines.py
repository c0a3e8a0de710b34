"""Modelled machines as a page.

Every constant with its unit, its value on each machine that comes with tdpass, and its source. `python -m
tdpass.views.machines > docs/machines.md` writes it anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import tdpass.targets  # noqa: F401 - registers what has constants
from tdpass.targets.constants import Constants

_HEAD = (
    "# Constants of the modelled machines\n\n"
    "Written by `python -m tdpass.views.machines` from the dataclasses and the presets; where a row has no "
    "source, that of the machine holds."
)


def page() -> str:
    """The page, in Markdown."""
    kinds = sorted(Constants.__subclasses__(), key=lambda kind: kind.noun)
    return "\n\n".join([_HEAD, *(part for kind in kinds for part in _kind(kind))]) + "\n"


def _kind(kind: type[Constants]) -> list[str]:
    meanings = [(f"`{name}`", unit, meaning) for name, (unit, meaning) in kind.described().items()]
    machines = (_machine(name, kind.load(name)) for name in kind.presets())
    return [
        f"## {kind.noun[0].upper()}{kind.noun[1:]}: `{kind.__name__}`",
        _table(("constant", "unit", "meaning"), meanings),
        *machines,
    ]


def _machine(name: str, constants: Constants) -> str:
    rows = [
        (f"`{field}`", _text(value), constants.sources.get(field, ""))
        for field, value in constants.figures().items()
        if value != ()
    ]
    return f"### {name}\n\n{constants.source}\n\n{_table(('constant', 'value', 'source'), rows)}"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(page())
