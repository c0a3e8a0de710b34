"""Objects that are named in files and on the command line, as `package.module:name`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from tdpass.errors import InvalidModelError, TdpassError, UsageError
from tdpass.registry import nearest


def named(text: str) -> Any:
    """The object that `package.module:name` names, imported with the current folder on the path.

    Raises `UsageError`.
    """
    module_name, _, name = text.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"cannot import {module_name!r} of {text!r}: {error}; run from the folder it lies in, or "
            "install it"
        ) from error
    except ValueError:
        raise UsageError(f"{text!r} names no module; name a function, as package.module:name") from None
    if not hasattr(module, name):
        meant = nearest(name, vars(module))
        raise UsageError(
            f"module {module_name!r} has no {name!r}{meant}; name a function, as package.module:name"
        )
    return getattr(module, name)


def made_by(text: str, *arguments: object) -> Any:
    """What the named function returns; raises `UsageError`, or `InvalidModelError` where it fails."""
    function = named(text)
    try:
        return function(*arguments)
    except TdpassError:
        raise
    except Exception as error:
        with_what = f"called with {arguments}" if arguments else "called without arguments"
        raise InvalidModelError(
            f"{text!r} failed when it was {with_what}: {type(error).__name__}: {error}"
        ) from error
