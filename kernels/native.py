"""The compiled CPU kernels: found in the installation, else built once into the cache folder.

Where neither works they are absent, with a reason.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from ctypes import Structure, c_int32, c_int64
from pathlib import Path

import torch
from torch import Tensor

from tdpass import files
from tdpass.errors import KernelError
from tdpass.kernels import build
from tdpass.kernels.activation import Activation
from tdpass.kernels.interface import Interface

_DECLARED = Interface.read((build.SOURCES / "tdpass.h").read_text())


def _numbers(enum: str) -> dict[str, int]:
    """The numbers of an enumeration by the rest of each name, in lower case."""
    found = _DECLARED.enums[f"tdpass_{enum}"]
    return {name.removeprefix("TDPASS_").lower(): number for name, number in found.items()}


_TYPES = {getattr(torch, name): number for name, number in _numbers("dtype").items()}
DTYPES: dict[torch.dtype, int] = {
    dtype: number for dtype, number in _TYPES.items() if dtype.is_floating_point
}
UINT8 = _TYPES[torch.uint8]
_FUNCTIONS = _numbers("function")
LANES = {f"{name.removesuffix('_lanes')}s": number for name, number in _numbers("lanes").items()}
CStage, CImage, CChain, CRows, CProgram, CSparse, CCell = (
    _DECLARED.structures[f"tdpass_{name}"]
    for name in ("stage", "image", "chain", "rows", "program", "sparse", "cell")
)
CActivation, CGrid, CInt8Chain, CMatrix, CWeightOnly, CInt8Cell, CLevels = (
    _DECLARED.structures[f"tdpass_{name}"]
    for name in ("activation", "grid", "int8_chain", "matrix", "weight_only", "int8_cell", "levels")
)


def serving(x: Tensor, residual: Tensor | None) -> ctypes.CDLL | None:
    """The library, where its kernels take an input of that type with that residual."""
    fits = x.dtype in DTYPES and (residual is None or residual.dtype == x.dtype)
    return library() if fits else None


def activation(text: str) -> Structure:
    """What a layer ends with; raises `KernelError` for a text that is not known."""
    said = Activation.read(text)
    return CActivation(_FUNCTIONS[said.function], said.low, said.high)


def stage(integers: Sequence[int]) -> Structure:
    """A stage of these integers, in the order of its fields."""
    return CStage.from_buffer_copy((c_int32 * len(integers))(*integers))


def rows(tensor: Tensor) -> Structure:
    """A contiguous tensor as rows of its last axis."""
    return CRows(tensor.data_ptr(), tensor.numel() // tensor.shape[-1], tensor.shape[-1], tensor.shape[-1])


def image(tensor: Tensor) -> Structure:
    """A view of a four-dimensional tensor."""
    return CImage(tensor.data_ptr(), (c_int64 * 4)(*tensor.shape), (c_int64 * 4)(*tensor.stride()))


def cache_folder() -> Path:
    """Where libraries built on first use lie."""
    return Path(os.environ.get("TDPASS_KERNELS") or files.cache_folder() / "kernels")


def chosen_isa() -> str:
    """The best instruction set of this machine that the compiler knows, or the one that TDPASS_ISA names.

    Raises `KernelError` for one it has not.
    """
    known, asked = build.machine_targets(), os.environ.get("TDPASS_ISA", "")
    if asked and asked not in known:
        raise KernelError(f"TDPASS_ISA={asked!r} cannot be used here; this machine runs {', '.join(known)}")
    return asked or next(target for target in known if build.compiles(target))


def sanitizing() -> tuple[str, ...]:
    """Flags of the sanitizers where TDPASS_SANITIZE is set; the process has to start with libasan loaded."""
    return (
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1")
        if os.environ.get("TDPASS_SANITIZE")
        else ()
    )


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not sys.platform.startswith("linux"):
        return None, f"the CPU kernels are built for Linux, this is {sys.platform}"
    target = chosen_isa()
    installed = build.SOURCES / build.LIBRARY
    try:
        if installed.exists():
            path = installed
        else:
            parts, folder = build.units([target], sanitizing()), build.own_folder(cache_folder())
            place = build.own_folder(folder / build.fingerprint(parts)) / build.LIBRARY
            path = build.trusted(
                build.build(place, parts, build.own_folder(folder / "objects"), sanitizing())
            )
        library = ctypes.CDLL(str(path))
    except (KernelError, OSError) as error:
        return None, str(error)
    _DECLARED.declare(library)
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


@functools.cache
def multiplies_pairs() -> bool:
    """Whether pairs of bfloat16 are multiplied by an instruction of their own.

    Without it they are widened one by one.
    """
    return isa() in ("amx", "avx512bf16", build.EMULATED)


@functools.cache
def _onnx_ops() -> Path:
    if not sys.platform.startswith("linux"):
        raise KernelError(f"the operators are built for Linux, this is {sys.platform}")
    installed = build.ONNXRUNTIME / build.ONNXRUNTIME_LIBRARY
    if installed.exists():
        return installed
    targets, folder = [chosen_isa()], build.own_folder(cache_folder())
    path = (
        build.own_folder(folder / build.fingerprint(build.onnxruntime_units(targets)))
        / build.ONNXRUNTIME_LIBRARY
    )
    return build.trusted(build.build_onnxruntime(path, build.own_folder(folder / "objects"), targets))


def onnx_ops_path() -> Path:
    """The library of fused operators for `onnxruntime.SessionOptions.register_custom_ops_library`.

    Built on first use where it is not installed. What is built on first use serves the instruction set of
    this machine; `kernels.build.build_onnxruntime` makes one for all. Raises `KernelError`, saying why, where
    there is none.
    """
    try:
        return _onnx_ops()
    except (KernelError, OSError) as error:
        message = (
            f"the fused operators for ONNX Runtime are missing: {error}; "
            "models run without them, as standard operators"
        )
        raise KernelError(message) from None


@functools.cache
def version() -> str:
    """Identifies the kernels by their sources: measured times are good for no other."""
    return _fingerprint(chosen_isa(), sanitizing())


@functools.cache
def _fingerprint(isa: str, flags: tuple[str, ...]) -> str:
    return build.fingerprint(build.units([isa], flags))
