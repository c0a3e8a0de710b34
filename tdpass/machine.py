"""The machine that this process runs on."""

from __future__ import annotations

import functools
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@functools.cache
def processor() -> str:
    """The name of the processor as its maker gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def installed_version() -> str:
    """The version of tdpass that is installed, else `uninstalled`."""
    try:
        return version("tdpass")
    except PackageNotFoundError:
        return "uninstalled"
