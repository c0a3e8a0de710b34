"""The table of measured times: kept between processes, shared by them, and begun again when damaged."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tdpass.site import Site
from tdpass.timings import FILE, Key, Row, TimingTable, geometry_of

KEY = Key("cpu", "eager 1", 1, 1, "float32", "conv", "svd 1", (8,))


def keys(count: int, start: int = 0) -> list[Key]:
    return [replace(KEY, rank=(start + n,)) for n in range(count)]


def test_rows_are_there_for_the_next_process(tmp_path: Path) -> None:
    first = TimingTable(tmp_path)
    rows = {key: Row(0.5 / (n + 1), careful=n % 2 == 0) for n, key in enumerate(keys(1200))}
    first.put(rows)
    first.put({KEY: Row(math.inf)})
    second = TimingTable(tmp_path)
    assert second.get([*rows, KEY]) == {**rows, KEY: Row(math.inf)}
    assert second.get([replace(KEY, threads=2), replace(KEY, runtime="eager 2")]) == {}
    assert not first.notes
    assert not second.notes


def test_a_later_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    table = TimingTable(tmp_path)
    table.put({KEY: Row(1.0)})
    table.put({KEY: Row(2.0, careful=True)})
    assert table.get([KEY]) == TimingTable(tmp_path).get([KEY]) == {KEY: Row(2.0, careful=True)}


def test_without_a_folder_it_remembers_for_itself() -> None:
    table = TimingTable(None)
    table.put({KEY: Row(1.0)})
    assert table.get([KEY]) == {KEY: Row(1.0)}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    table = TimingTable(tmp_path / "file")
    table.put({KEY: Row(1.0)})
    assert table.get([KEY]) == {KEY: Row(1.0)}
    assert not table.notes


@pytest.mark.parametrize("damage", ["not a database", "cut short", "another table", "text for seconds"])
def test_a_damaged_file_is_moved_aside_and_begun_again(tmp_path: Path, damage: str) -> None:
    TimingTable(tmp_path).put({key: Row(1.0) for key in keys(500)})
    path = tmp_path / FILE
    if damage == "not a database":
        path.write_bytes(b"nonsense" * 1000)
    elif damage == "cut short":
        with closing(sqlite3.connect(path)) as file:
            file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        path.write_bytes(path.read_bytes()[:6000])
    else:
        with closing(sqlite3.connect(path)) as file, file:
            if damage == "another table":
                file.execute("DROP TABLE timings_3")
                file.execute("CREATE TABLE timings_3 (other TEXT)")
            else:
                file.execute("UPDATE timings_3 SET seconds = 'soon'")
    table = TimingTable(tmp_path)
    assert table.get(keys(500)) == {}
    assert len(table.notes) == 1
    assert "damaged" in table.notes[0]
    table.put({KEY: Row(2.0)})
    assert TimingTable(tmp_path).get([KEY]) == {KEY: Row(2.0)}
    assert len(list(tmp_path.glob("timings.damaged-*"))) == 1


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from tdpass.timings import Key, Row, TimingTable
key = Key("cpu", "eager 1", 1, 1, "float32", "conv", "svd 1", (8,))
for n in range(20):
    TimingTable(Path(sys.argv[1])).put({replace(key, rank=(int(sys.argv[2]) + 5 * n + k,)): Row(1.0) for k in range(5)})
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(1000 * n)]) for n in range(3)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    wanted = [key for n in range(3) for key in keys(100, 1000 * n)]
    table = TimingTable(tmp_path)
    assert len(table.get(wanted)) == 300
    assert not table.notes


def test_a_key_knows_the_geometry_but_not_the_name() -> None:
    site = Site("a", "linear", (8, 8), extents=(((3,), (3,)),))
    assert geometry_of(site) == geometry_of(replace(site, name="b"))
    assert (
        len(
            {
                geometry_of(s)
                for s in (
                    site,
                    replace(site, bias=True),
                    replace(site, shape=(8, 4)),
                    replace(site, extents=(((4,), (4,)),)),
                )
            }
        )
        == 4
    )
