"""The compiled CPU kernels: found in the installation, else built once into the cache folder, else absent with a reason."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import Structure, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import build

ISAS = ("avx512", "avx2", "generic")
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS: dict[str, int] = {"identity": 0, "relu": 1, "silu": 2, "gelu": 3}
LANES: dict[str, int] = {"channels": 0, "pixels": 1}


class CStage(Structure):
    """tdpass_stage."""

    _fields_ = [("integers", c_int32 * 13)]


class CImage(Structure):
    """tdpass_image."""

    _fields_ = [("data", c_void_p), ("size", c_int64 * 4), ("stride", c_int64 * 4)]


class CChain(Structure):
    """tdpass_chain."""

    _fields_ = [
        ("dtype", c_int32),
        ("lanes", c_int32),
        ("activation", c_int32),
        ("stages", c_int32),
        ("stage", c_void_p),
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
    ]


def image(tensor: Tensor) -> CImage:
    """A view of a four-dimensional tensor."""
    return CImage(tensor.data_ptr(), (c_int64 * 4)(*tensor.shape), (c_int64 * 4)(*tensor.stride()))


def cached_path() -> Path:
    """Where a library built on first use lies: one per state of the sources."""
    root = os.environ.get("TDPASS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdpass"
    return Path(os.environ.get("TDPASS_KERNELS") or Path(root) / "kernels") / build.fingerprint() / build.LIBRARY


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if sys.byteorder != "little" or not sys.platform.startswith("linux"):
        return None, f"the CPU kernels are built for Linux, this is {sys.platform}"
    asked = os.environ.get("TDPASS_ISA", "")
    if asked and asked not in ISAS:
        raise KernelError(f"TDPASS_ISA={asked!r} is not known; it is one of {', '.join(ISAS)}")
    installed = build.SOURCES / build.LIBRARY
    path = installed if installed.exists() else cached_path()
    try:
        library = ctypes.CDLL(str(path if path.exists() else build.build(path)))
    except (KernelError, OSError) as error:
        return None, str(error)
    library.tdpass_isa.restype = c_char_p
    library.tdpass_conv_chain.argtypes = [c_void_p] * 4
    return library, ""


def library() -> ctypes.CDLL | None:
    """The loaded library; None where there is none, and `missing()` says why."""
    return _load()[0]


def missing() -> str:
    """Why there are no native kernels; empty where there are."""
    return _load()[1]


def isa() -> str:
    """The instruction set in use; "none" without native kernels."""
    found = library()
    return "none" if found is None else found.tdpass_isa().decode()

