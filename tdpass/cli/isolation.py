"""`--isolate`: a verb in a process of its own, with limited time and memory.

A file nobody vouches for can then take no more of either than it is given.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdpass.errors import UnsupportedError, UsageError
from tdpass.files import remove_stale

SECONDS = 600  # a compression of the largest models of the benchmarks takes less
MEMORY = (
    "4GiB"  # the libraries take half a GiB, recorded runs at most two by default; the rest is for weights
)
_ENTRY = """\
import sys
from tdpass import cli
from tdpass.cli.isolation import Limits
Limits(int(sys.argv[1]), int(sys.argv[2])).set()
sys.exit(cli.main(sys.argv[3:], contained=True))
"""


@dataclass(frozen=True)
class Limits:
    """What the process may take.

    Seconds of the clock, and bytes of memory of its own (files that it maps not counted).
    """

    seconds: int
    memory: int

    def set(self) -> None:
        """Limit this process, for good: called before it opens anything."""
        resource: Any = importlib.import_module("resource")  # only POSIX has one
        processor = self.seconds * (
            os.cpu_count() or 1
        )  # holds even where whoever waits for the process is gone
        for kind, wanted in (
            (resource.RLIMIT_DATA, self.memory),
            (resource.RLIMIT_CPU, processor),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(kind, (limit, limit))

    def run(self, words: Sequence[str], folders: Sequence[Path] = ()) -> int:
        """Run `tdpass` with these words; returns its exit code, after its output and its one line of error.

        What it leaves in `folders` where it is ended is removed.  Raises `UnsupportedError` where it takes
        more or crashes, `UsageError` where the system knows no limits.
        """
        if os.name != "posix":
            raise UsageError(
                f"--isolate needs limits of processes, which {sys.platform} has not; leave it out, or run "
                "tdpass in a container"
            )
        # a session of its own: what it starts is ended with it
        command = [sys.executable, "-c", _ENTRY, str(self.seconds), str(self.memory), *words]
        # this very program, with the words it was given
        process = subprocess.Popen(command, start_new_session=True)  # noqa: S603
        try:
            code = process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            raise UnsupportedError(
                f"the run did not end within {self.seconds} seconds, the limit of --isolate; allow it more "
                "with --isolate-seconds"
            ) from None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for folder in {Path(tempfile.gettempdir()), *folders}:
                with suppress(OSError):
                    remove_stale(folder)
        if code < 0:
            raise UnsupportedError(
                f"the isolated process was ended by {signal.Signals(-code).name}, as it is where memory "
                "runs out or a file is made to crash its reader; "
                "allow it more with --isolate-memory if you trust the file"
            )
        return code
