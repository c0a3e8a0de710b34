"""Broken, odd and hostile ONNX files: what `tdpass inspect` makes of each, in what time and memory.

    python -m benchmarks.bench_broken

Each file is looked at in a forked process, so that time and peak memory are its own; starting Python and the
libraries is in the memory (about 0.4 GiB), not in the time, which is of the processor.  Rows go to
results/broken.csv; files that have one are left out.  Ends with exit code 1 where one is over the limits.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.results import FOLDER, Table, show
from tdpass.cli import main as tdpass

sys.path.append(str(FOLDER.parents[1] / "tests" / "models"))
from hostile_files import REFUSED, SERVED, Write

SECONDS, MEMORY = 10.0, 2048.0
COLUMNS = ("file", "exit_code", "cpu_seconds", "peak_mib", "left_behind", "says")


def look_at(path: Path, answer: Connection) -> None:
    """Inspect a file and send the exit code, what is said, the seconds and the peak memory in MiB."""
    said, start = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = tdpass(["inspect", str(path)])
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer.send((code, said.getvalue().strip().replace(str(path.parent), "."), seconds, peak))


def measure(write: Write) -> dict[str, str | float | int]:
    """One row of the table."""
    processes = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / write(Path(folder)).name
        before = set(Path(folder).iterdir())
        receiving, sending = processes.Pipe(duplex=False)
        process = processes.Process(target=look_at, args=(path, sending))
        process.start()
        sending.close()
        process.join(6 * SECONDS)
        ended = receiving.poll()
        process.kill()
        code, says, seconds, peak = (
            receiving.recv() if ended else (-1, "ended without an answer", 6 * SECONDS, float("nan"))
        )
        left = len(set(Path(folder).iterdir()) - before)
    return {"exit_code": code, "cpu_seconds": seconds, "peak_mib": peak, "left_behind": left, "says": says}


def main() -> int:
    """Every file of the matrix once; returns the exit code."""
    table = Table("broken.csv", COLUMNS)
    over: list[str] = []
    for name, write in [*((name, write) for name, (write, _) in REFUSED.items()), *SERVED.items()]:
        if table.has(file=name):
            continue
        row = measure(write)
        table.add(file=name, **row)
        fits = (
            row["exit_code"] == (1 if name in REFUSED else 0)
            and float(row["cpu_seconds"]) <= SECONDS
            and float(row["peak_mib"]) <= MEMORY
        )
        if not fits or row["left_behind"]:
            over.append(name)
    print(show(table.rows, COLUMNS[:-1]))
    print(
        f"over {SECONDS:g} s or {MEMORY:g} MiB, or another outcome than expected: {', '.join(over) or 'none'}"
    )
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
