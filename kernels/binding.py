"""The operators in C++ for torch, in one library that serves Python and programs without Python alike.

A call through it costs a fraction of one through Python.  It is built where it is asked for (`tdpass doctor
--build`, `deploy`, `build()`), which takes a C++ compiler; once it lies in the cache every process loads it.
TDPASS_BINDING=python leaves it alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tdpass.errors import KernelError
from tdpass.files import write_text
from tdpass.kernels import base, native
from tdpass.kernels import build as compiling
from tdpass.kernels.base import Op
from tdpass.kernels.build import Unit
from tdpass.registry import Registry

SOURCES = Path(__file__).parent / "torch_ops"
LIBRARY = "libtdpass_torch.so"
# of torch 2.10, the oldest that serves; a library built for it loads into every later one
_ABI = 0x020A000000000000
_TORCH = Path(torch.__file__).parent
_VARIABLE = "TDPASS_OPERATORS"


def path() -> Path:
    """Where the library lies once it is built.

    One per state of the sources, instruction set and version of torch.
    """
    return native.cache_folder() / compiling.fingerprint(_parts()) / LIBRARY


def build() -> Path:
    """Build the library unless it is there already.

    Raises `KernelError` without a compiler or where that fails.
    """
    target = path()
    if not target.exists():
        compiling.own_folder(native.cache_folder())
        compiling.own_folder(target.parent)
        compiling.own_folder(_schemas())
        write_text(
            _schemas() / "schemas.inc", "".join(f'"{op.name}{op.schema}",\n' for op in all_operators())
        )
        link = (f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10")
        compiling.build(target, _parts(), compiling.own_folder(native.cache_folder() / "objects"), link)
    return target


def load(library: Path | None = None) -> tuple[str, ...]:
    """Let the built library, or the one that lies beside a deployed model, serve its operators.

    Returns their names. Only the first library of a process is loaded.  Raises `KernelError` where it cannot
    be.
    """
    if not base.compiled():
        base.serve_compiled(lambda: _open(library or compiling.trusted(path())))
    return base.compiled()


def load_cached() -> tuple[str, ...]:
    """The same where it has been built and TDPASS_BINDING allows it; none otherwise."""
    asked = os.environ.get("TDPASS_BINDING", "")
    if asked not in ("", "cpp", "python"):
        raise KernelError(f"TDPASS_BINDING={asked!r} is not known; it is cpp or python")
    if asked == "python" or not sys.platform.startswith("linux"):
        return ()
    try:
        return load() if path().exists() else ()
    except (KernelError, OSError):
        return ()  # the Python implementations serve


def _open(library: Path) -> tuple[list[str], Callable[[bool], None]]:
    if not library.is_file():
        raise KernelError(f"there is no library {library}; run `tdpass doctor --build`")
    os.environ[_VARIABLE] = f"{os.getpid()} schemas"  # the library would define them itself
    try:
        opened = ctypes.CDLL(str(library))
        opened.tdpass_operators.restype = ctypes.c_char_p
        return opened.tdpass_operators().decode().split(), opened.tdpass_use_reference
    except (OSError, AttributeError) as error:
        raise KernelError(
            f"cannot load {library}: {error}; delete it and run `tdpass doctor --build`"
        ) from None


def _parts() -> list[Unit]:
    include = _TORCH / "include"
    flags = (
        f"-DTORCH_TARGET_VERSION={_ABI:#x}ULL",
        f"-I{_schemas()}",
        f"-isystem{include}",
        f"-DTDPASS_TORCH={torch.__version__.partition('+')[0]!r}",
    )
    return [
        *compiling.units([native.chosen_isa()]),
        *(Unit(source, flags) for source in sorted(SOURCES.glob("*.cpp"))),
    ]


def _schemas() -> Path:
    """Where the schemas lie as C++; one folder per state of the operators' sources."""
    state = hashlib.sha256(
        b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py")))
    )
    return native.cache_folder() / f"schemas_{state.hexdigest()[:20]}"


def all_operators() -> Registry[Op]:
    """Every operator, those included that nothing has imported so far."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg:
            importlib.import_module(f"tdpass.kernels.{module.name}")
    return base.OPS
