"""Text tables for a terminal or a pipe.

A terminal gets the first of several layouts that fits its width; a pipe gets one line per row at its natural
width, without colour or lines, so that grep, cut and less work on it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TextIO, TypeVar

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tdpass.views.units import plain

Row = TypeVar("Row")
Part = RenderableType
UNBOUNDED = 10_000


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column: its title, the text of a cell, and how it is set.

    `least` is the width below which a layout no longer counts as fitting; 0 means that cells must not wrap at
    all.
    """

    title: str
    cell: Callable[[Row], str]
    number: bool = False
    least: int = 0


def width_of(file: TextIO) -> int | None:
    """Columns of a terminal, or None for a pipe, where lines may be of any length."""
    console = Console(file=file)
    return console.width if console.is_terminal or "COLUMNS" in os.environ else None


def write(parts: Iterable[Part], file: TextIO) -> None:
    """Write tables and lines to a terminal or a pipe, without trailing blanks."""
    console = Console(file=file)
    file.write(to_text(parts, width_of(file), console if console.is_terminal else None))
    file.flush()


def to_text(parts: Iterable[Part], width: int | None, console: Console | None = None) -> str:
    """The text of tables and lines at that width.

    With colour only where `console` is a terminal that has it.
    """
    buffer = io.StringIO()
    inside = Console(
        file=buffer,
        width=width or UNBOUNDED,
        force_terminal=console is not None,
        color_system=console.color_system if console is not None else None,  # type: ignore[arg-type]
        no_color=console.no_color if console is not None else True,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for part in parts:
        inside.print(part, soft_wrap=isinstance(part, Text) and width is None)
    return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())


def fitting(
    layouts: Sequence[Sequence[Column[Row]]],
    rows: Sequence[Row],
    width: int | None,
    dim: Callable[[Row], bool] | None = None,
) -> tuple[Table, int]:
    """A table in the first layout that fits the width, else in the last, and the layout's index.

    `dim` says which rows are set back.
    """
    for index, columns in enumerate(layouts[:-1]):
        table = _table(columns, rows, width, dim)
        if width is None or _least_width(table) <= width:
            return table, index
    return _table(layouts[-1], rows, width, dim), len(layouts) - 1


def grid(
    titles: Sequence[str],
    lines: Iterable[Sequence[str]],
    width: int | None,
    numbers: Iterable[int] = (),
    wraps: Iterable[int] = (),
) -> Table:
    """A plain table of texts.

    `numbers` are the columns set flush right, `wraps` those that may take several lines.
    """
    table = _empty_table(width)
    right, free = set(numbers), set(wraps)
    for index, title in enumerate(titles):
        table.add_column(
            title, justify="right" if index in right else "left", no_wrap=index not in free, overflow="fold"
        )
    for line in lines:
        table.add_row(*(Text(plain(cell), overflow="fold") for cell in line))
    return table


def pairs(facts: Iterable[tuple[str, str]], gap: int = 2) -> Table:
    """Names and values under one another."""
    lines = Table.grid(padding=(0, gap))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for name, value in facts:
        lines.add_row(name, Text(plain(value)))
    return lines


def heading(text: str) -> Text:
    """A line that names what follows."""
    return Text(plain(text), style="bold")


def item(text: str) -> Table:
    """A line of a list, indented where it wraps."""
    return pairs([("-", text)], gap=1)


def _table(
    columns: Sequence[Column[Row]], rows: Sequence[Row], width: int | None, dim: Callable[[Row], bool] | None
) -> Table:
    table = _empty_table(width)
    lines = [[column.cell(row) for column in columns] for row in rows]
    for index, column in enumerate(columns):
        # rich would shrink even columns that may not wrap, so their least width is spelled out
        natural = max(map(len, "\n".join([column.title, *(cells[index] for cells in lines)]).split("\n")))
        least = min(natural, column.least) if column.least else natural
        table.add_column(
            column.title,
            justify="right" if column.number else "left",
            no_wrap=not column.least,
            overflow="fold",
            min_width=least,
        )
    for row, cells in zip(rows, lines, strict=True):
        style = "dim" if dim is not None and dim(row) else ""
        table.add_row(*(Text(cell, style=style, overflow="fold") for cell in cells))
    return table


def _empty_table(width: int | None) -> Table:
    lines = box.SIMPLE_HEAD if width else None
    return Table(
        box=lines,
        padding=(0, 1 if width else 2, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        collapse_padding=True,
    )


def _least_width(table: Table) -> int:
    console = Console(width=UNBOUNDED, file=io.StringIO())
    return Measurement.get(console, console.options, table).minimum
