"""Arrays in `.npy` and `.npz` files, whose sizes are held against the file before anything is allocated."""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tdpass.errors import InvalidModelError, UsageError

Array = npt.NDArray[Any]
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# zipfile knows encryption and methods that this Python lacks only as RuntimeError and NotImplementedError;
# numpy tokenizes headers
_FAULTS = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_arrays(path: Path) -> Array | dict[str, Array]:
    """The array of a `.npy` file, or those of a `.npz` file by name; nothing is unpickled.

    Raises `InvalidModelError` for a damaged file and for one that declares more than it holds or than memory
    takes, `UsageError` for another suffix.
    """
    if path.suffix == ".npy":
        with _clear_errors(path), path.open("rb") as file:
            return _read(file, path.stat().st_size, path.name)
    if path.suffix == ".npz":
        with _clear_errors(path), zipfile.ZipFile(path) as archive:
            return _read_all(archive)
    raise UsageError(f"cannot read {path.name!r} as calibration data; give an .npz or .npy file")


def _read_all(archive: zipfile.ZipFile) -> dict[str, Array]:
    members = [member for member in archive.infolist() if not member.is_dir()]
    sizes = {member.filename.removesuffix(".npy"): member for member in members}
    if len(sizes) < len(members):
        raise ValueError("two of its arrays have the same name")
    _check_memory(sum(member.file_size for member in members))
    arrays = {}
    for name, member in sizes.items():
        with archive.open(member) as file:
            arrays[name] = _read(file, member.file_size, name)
            if file.read(1):
                raise ValueError(f"array {name!r} is followed by more bytes than it declares")
    return arrays


def _read(file: IO[bytes], size: int, name: str) -> Array:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"array {name!r} is of format {version}; {', '.join(map(str, _HEADERS))} are read")
    shape, by_columns, dtype = _HEADERS[version](file)
    if dtype.hasobject or dtype.kind not in "fiub":
        raise ValueError(f"array {name!r} holds {dtype}; give numbers")
    if any(not isinstance(length, int) or length < 0 for length in shape):
        raise ValueError(f"array {name!r} declares the shape {shape}")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > size:
        raise ValueError(f"array {name!r} declares {wanted:,} bytes, and the file holds {size:,} of it")
    _check_memory(wanted)
    content = file.read(wanted)
    if len(content) < wanted:
        raise ValueError(f"array {name!r} is cut off after {len(content):,} of {wanted:,} bytes")
    found = np.frombuffer(bytearray(content), dtype)
    return found.reshape(shape, order="F" if by_columns else "C")


def _check_memory(size: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else size
    if size > memory:
        raise ValueError(f"it declares {size:,} bytes, and this machine has {memory:,} of memory")


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise InvalidModelError(
            f"cannot read calibration data from {path}: {str(error) or type(error).__name__}; write it with "
            "numpy.savez"
        ) from None
