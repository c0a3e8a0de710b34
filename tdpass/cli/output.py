"""What a verb prints: tables for people or one JSON document for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from tdpass.progress import ProgressBars
from tdpass.views import tables


@dataclass(frozen=True)
class Output:
    """Where results go: tables or a JSON document on stdout, all else on stderr."""

    json: bool
    quiet: bool
    stdout: TextIO
    stderr: TextIO

    def show(
        self, document: Mapping[str, object], view: Callable[[int | None], Sequence[tables.Part]]
    ) -> None:
        """The result of a verb: `document` under `--json`, else the tables that `view` makes for a width."""
        if self.json:
            self.stdout.write(json.dumps(finite(document), indent=1) + "\n")
        elif not self.quiet:
            tables.write(view(tables.width_of(self.stdout)), self.stdout)

    def progress(self) -> ProgressBars:
        """Progress on stderr."""
        return ProgressBars(self.stderr, shown=not self.json and not self.quiet)

    def say(self, text: str) -> None:
        """A line on what is going on, on stderr."""
        if not self.quiet:
            self.stderr.write(text + "\n")
            self.stderr.flush()

    def flush(self) -> None:
        """Hand all to the operating system, so that a closed pipe shows while it can still be answered."""
        self.stdout.flush()


def finite(value: object) -> object:
    """The same value with infinities and NaN, which JSON does not know, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
