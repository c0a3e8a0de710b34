"""Libraries that are asked for only where data comes from them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from tdpass.errors import UsageError


def is_installed(name: str) -> bool:
    """Whether a package can be found; it is not imported."""
    return importlib.util.find_spec(name) is not None


def optional(name: str, package: str, why: str) -> ModuleType:
    """The module; raises `UsageError` saying what to install, and why, where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # a torchvision built for another torch fails with RuntimeError
        raise UsageError(f"{why} needs {package}: {error}; pip install {package}") from None
