"""Benchmark results as CSV: a row per measurement, with its machine, commit, date and torch version."""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from tdpass.machine import processor

FOLDER = Path(__file__).parent / "results"
STAMP = ("machine", "commit", "date", "torch")
Value = str | float | int | None
_DIRTY = "-dirty"


def skip(reason: str) -> NoReturn:
    """End the program with a message, but not as a failure: this machine lacks what the benchmark needs."""
    print(f"skipped: {reason}")
    raise SystemExit(0)


def machine() -> str:
    """Processor, cores this process may use, threads torch uses, and the widest vector instructions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{processor()} {torch.backends.cpu.get_cpu_capability()}, {cores} cores, "
        f"{torch.get_num_threads()} threads"
    )


def commit() -> str:
    """The commit that is checked out, with `-dirty` where files differ from it.

    `none` outside a repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    run = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else "none"


class Table:
    """A CSV file that grows row by row, so that an interrupted benchmark keeps what it has measured.

    >>> table = Table("planner.csv", ("case", "seconds"))
    >>> table.add(case="svd", seconds=1.5)  # doctest: +SKIP
    """

    def __init__(self, name: str | Path, columns: Sequence[str]) -> None:
        self.path = FOLDER / name
        self.columns = (*columns, *STAMP)
        self.rows: list[Mapping[str, Value]] = []
        self.earlier: list[Mapping[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self.earlier = list(csv.DictReader(file))
                file.seek(0)
                header = tuple(next(csv.reader(file), ()))
            if header != self.columns:
                raise SystemExit(
                    f"{self.path} has the columns {', '.join(header)}; move it away to write "
                    f"{', '.join(self.columns)}"
                )

    def has(self, **row: Value) -> bool:
        """Whether the file had such a row when it was opened.

        So an interrupted benchmark goes on where it was.
        """
        return any(
            all(earlier[name] == _written(value) for name, value in row.items()) for earlier in self.earlier
        )

    def has_of_commit(self, **row: Value) -> bool:
        """The same of a row measured at the commit that is checked out, whatever else differed then."""
        clean = commit().removesuffix(_DIRTY)
        return any(self.has(**row, commit=name) for name in (clean, clean + _DIRTY))

    def kept(self, **values: Value) -> Mapping[str, str] | None:
        """The last row in the file that was measured on this machine with these values, where there is one.

        A benchmark that was interrupted goes on after what it kept.
        """
        if not self.path.exists():
            return None
        wanted = {name: str(value) for name, value in {**values, "machine": machine()}.items()}
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
        return rows[-1] if rows else None

    def add(self, **row: Value) -> None:
        """Append one measurement; floats are rounded to six significant digits."""
        stamp = {
            "machine": machine(),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "torch": torch.__version__,
        }
        record = {name: _written(value) for name, value in {**row, **stamp}.items()}
        unknown = set(record) - set(self.columns)
        if unknown:
            raise ValueError(f"{self.path.name} has no column {', '.join(sorted(unknown))}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(record)
        self.rows.append(row)


def _written(value: Value, digits: int = 6) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else str(value)


def show(rows: Sequence[Mapping[str, Value]], columns: Sequence[str]) -> str:
    """Rows as an aligned text table."""
    cells = [list(columns), *([_written(row.get(name), digits=4) for name in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    )
