"""Measured times on disk, in one SQLite file that several processes may use at once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tdpass.site import Site

FILE = "timings.sqlite"
_WAIT_SECONDS = 30.0
_CREATE = (
    "CREATE TABLE IF NOT EXISTS timings_3 (key TEXT PRIMARY KEY, seconds REAL, careful "
    "INTEGER NOT NULL, digest TEXT NOT NULL)"
)
_DAMAGE = ("malformed", "no such column", "has no column", "disk image")
_KEYS_PER_QUERY = 500


@dataclass(frozen=True)
class Key:
    """What a time depends on; the site's name is not among it.

    `runtime` and `format` hold their versions, `geometry` the site's geometry and the sizes of one call.
    """

    device: str
    runtime: str
    threads: int
    batch: int
    dtype: str
    geometry: str
    format: str
    rank: tuple[int, ...]

    def __str__(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Row:
    """Seconds of one call, infinite where the runtime cannot serve the layer.

    `careful` when they come of many rounds.
    """

    seconds: float
    careful: bool = False


def geometry_of(site: Site) -> str:
    """Geometry, bias and call sizes of a site as text."""
    return json.dumps([site.geometry(), site.bias, site.extents], sort_keys=True)


class TimingTable:
    """Rows by key, in memory and, with a folder, in a file there; None keeps nothing for the next process.

    A damaged file is moved aside and begun again, which `notes` says; one that cannot be written is no error.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / FILE
        self.notes: list[str] = []
        self._known: dict[str, Row] = {}

    def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        """The rows that are there."""
        texts = {str(key): key for key in keys}
        missing = [text for text in texts if text not in self._known]
        if missing:
            self._known.update(self._run(lambda file: _select(file, missing)))
        return {key: self._known[text] for text, key in texts.items() if text in self._known}

    def put(self, rows: Mapping[Key, Row]) -> None:
        """Add rows, or replace those with the same keys."""
        records = [_record(str(key), row) for key, row in rows.items()]
        self._known.update((str(key), row) for key, row in rows.items())
        if records:
            self._run(lambda file: _insert(file, records))

    def _run(self, work: Callable[[sqlite3.Connection], dict[str, Row]]) -> dict[str, Row]:
        """Do something with the file; once more with a new one where the old one is damaged."""
        for _ in range(2):
            if self.path is None:
                break
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as file, file:
                    # readers do not wait for a writer then; where another process is just opening the file,
                    # it does this
                    with suppress(sqlite3.OperationalError):
                        file.execute("PRAGMA journal_mode=WAL")
                    file.execute(_CREATE)
                    return work(file)
            except (sqlite3.DatabaseError, ValueError, TypeError) as error:
                if isinstance(error, sqlite3.OperationalError) and not any(
                    word in str(error) for word in _DAMAGE
                ):
                    if "locked" not in str(error):
                        self.path = None
                    break
                self._move_aside(str(error))
            except OSError:
                self.path = None
        return {}

    def _move_aside(self, reason: str) -> None:
        assert self.path is not None
        aside = self.path.with_name(f"{self.path.stem}.damaged-{time.time_ns()}{self.path.suffix}")
        # another process may have moved it already
        with suppress(OSError):
            self.path.replace(aside)
            self.notes.append(
                f"the table of measured times {self.path} was damaged ({reason}); it is now {aside.name}, "
                "and layers are measured again"
            )
        for ending in ("-wal", "-shm"):
            with suppress(OSError):
                self.path.with_name(self.path.name + ending).unlink()


_Record = tuple[str, float | None, int, str]


def _record(key: str, row: Row) -> _Record:
    """The row as it is stored, with a digest over it.

    SQLite checks its pages' structure, not what is in them.
    """
    seconds = row.seconds if row.seconds < float("inf") else None
    content = f"{len(key)}:{key}{seconds!r}{int(row.careful)}"
    return key, seconds, int(row.careful), hashlib.blake2b(content.encode(), digest_size=20).hexdigest()


def _select(file: sqlite3.Connection, keys: Sequence[str]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        part = keys[start : start + _KEYS_PER_QUERY]
        marks = ",".join("?" * len(part))
        for record in file.execute(
            f"SELECT key, seconds, careful, digest FROM timings_3 WHERE key IN ({marks})",  # noqa: S608
            part,
        ):
            key, seconds, careful, _ = record
            row = Row(float("inf") if seconds is None else float(seconds), bool(careful))
            if _record(key, row) == record:
                found[key] = row
    return found


def _insert(file: sqlite3.Connection, records: Sequence[_Record]) -> dict[str, Row]:
    file.executemany("INSERT OR REPLACE INTO timings_3 VALUES (?, ?, ?, ?)", records)
    return {}
