"""A stranger's first hour, played by `tests/first_hour.sh`: how long each step takes, and beside what.

python -m benchmarks.first_hour [FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.results import FOLDER, Table

SCRIPT = FOLDER.parent.parent / "tests" / "first_hour.sh"
COLUMNS = ("step", "seconds", "result", "beside", "load")
BUSY = 0.5  # running processes to a core, before anything is started, from which the machine is not quiet


def beside(load: float, cores: int) -> str:
    """What else the machine did: `a quiet machine`, or `a busy process` where others ran."""
    return "a busy process" if load / cores > BUSY else "a quiet machine"


def keep(times: Path, load: float, table: Table) -> None:
    """Put the script's table into the benchmark's, under the load that the machine had."""
    shared = {"beside": beside(load, os.cpu_count() or 1), "load": load}
    with times.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            seconds = float(row["seconds"]) if row["seconds"] else None
            table.add(step=row["step"], seconds=seconds, result=row["result"], **shared)


def main() -> int:
    """Play it, keep the times whatever came of it, and give back what the script said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/first_hour"))
    folder = parser.parse_args().folder.resolve()
    load = os.getloadavg()[0]
    played = subprocess.run([str(SCRIPT), str(folder)], check=False)
    keep(folder / "times.csv", load, Table("first_hour.csv", COLUMNS))
    return played.returncode


if __name__ == "__main__":
    sys.exit(main())
