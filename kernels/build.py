"""Compiles the C++ kernels into one shared library, with nothing but a C++ compiler."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tdpass.errors import KernelError
from tdpass.files import folder_beside

SOURCES = Path(__file__).parent / "cpu"
LIBRARY = "libtdpass_cpu.so"
ONNXRUNTIME = SOURCES.parent / "onnxruntime"
ONNXRUNTIME_LIBRARY = "libtdpass_onnxruntime.so"
ONNXRUNTIME_LINK = ("-Wl,--as-needed", f"-Wl,--version-script={ONNXRUNTIME / 'exports.map'}")
_LOG = logging.getLogger("tdpass.kernels")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
TARGETS: dict[str, tuple[str, ...]] = {"generic": ()}
_NEEDS: dict[str, frozenset[str]] = {"generic": frozenset()}
EMULATED = "amxemulated"  # has to be asked for
if platform.machine() in ("x86_64", "AMD64"):
    _AVX2 = ("-march=x86-64-v3",)
    _AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
    _VNNI = (*_AVX512, "-mavx512vnni")
    _BF16 = (*_VNNI, "-mavx512bf16")
    TARGETS = {
        "amx": (*_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
        "avx512bf16": _BF16,
        "avx512vnni": _VNNI,
        "avx512": _AVX512,
        "avxvnni": (*_AVX2, "-mavxvnni"),
        "avx2": _AVX2,
        "generic": ("-march=x86-64-v2",),
        EMULATED: (*_AVX512, "-DTDPASS_AMX_EMULATED"),
    }
    _NEEDS |= {
        "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}),
        "avx2": frozenset({"avx2", "fma", "bmi2"}),
    }
    _NEEDS |= {"avxvnni": _NEEDS["avx2"] | {"avx_vnni"}, EMULATED: _NEEDS["avx512"]}
    _NEEDS |= {"avx512vnni": _NEEDS["avx512"] | {"avx512_vnni"}}
    _NEEDS |= {"avx512bf16": _NEEDS["avx512vnni"] | {"avx512_bf16"}}
    _NEEDS |= {"amx": _NEEDS["avx512bf16"] | {"amx_tile", "amx_int8", "amx_bf16"}}
_NEWEST = frozenset({"amx", "avxvnni"})
_ROUNDED_ALONE = (
    "-ffp-contract=off",
)  # every operation, as the references do: whole numbers then agree bit for bit
_OF_SOURCE: dict[str, tuple[str, ...]] = {
    "conv_chain_int8.cpp": _ROUNDED_ALONE,
    "recurrent_int8.cpp": _ROUNDED_ALONE,
}
_COMMON = "dispatch.cpp"
_IN_ONNXRUNTIME = frozenset(
    {
        "conv_chain.cpp",
        "conv_chain_int8.cpp",
        "recurrent.cpp",
        "recurrent_int8.cpp",
        "sparse.cpp",
        "weight_only.cpp",
    }
)
_SECONDS = 1800
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@cache
def compiles(target: str) -> bool:
    """Whether the compiler there is knows the flags of an instruction set; True where there is none to ask.

    Only of the newest it is asked: what compiles the sources at all knows the others.
    """
    cxx = compiler()
    if cxx is None or target not in _NEWEST:
        return True
    command = [cxx, *TARGETS[target], "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(  # noqa: S603
        command, input="", capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode == 0


def compiled_targets() -> tuple[str, ...]:
    """What a library for every machine is compiled for: the instruction sets that the compiler knows."""
    return tuple(target for target in TARGETS if target != EMULATED and compiles(target))


@dataclass(frozen=True)
class Unit:
    """One source to compile with these flags."""

    source: Path
    flags: tuple[str, ...]

    @property
    def key(self) -> str:
        """Identifies the object: the source, every header it includes, the flags and the compiler."""
        state = hashlib.sha256(repr((FLAGS, self.flags, compiler(), platform.machine())).encode())
        for path in _with_headers(self.source):
            state.update(path.name.encode() + path.read_bytes())
        return state.hexdigest()[:20]


def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++, clang++ or c++, whichever is found first."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    return None


@cache
def machine_targets() -> tuple[str, ...]:
    """The instruction sets that this machine runs, best first; what has to be asked for comes last."""
    try:
        flags = set(
            re.findall(
                r"\w+",
                next(
                    line
                    for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("flags")
                ),
            )
        )
    except (OSError, StopIteration):
        flags = set()
    return tuple(target for target in TARGETS if _NEEDS[target] <= flags)


def units(targets: Sequence[str], extra: Sequence[str] = ()) -> list[Unit]:
    """What a library for these instruction sets is compiled from; `extra` are further flags."""
    kernels = [
        Unit(
            source, (*extra, *TARGETS[target], *_OF_SOURCE.get(source.name, ()), f"-DTDPASS_TARGET={target}")
        )
        for source in sorted(SOURCES.glob("*.cpp"))
        if source.name != _COMMON
        for target in targets
    ]
    return [Unit(SOURCES / _COMMON, (*extra, "-fopenmp")), *kernels]


def onnxruntime_units(targets: Sequence[str], extra: Sequence[str] = ()) -> list[Unit]:
    """What the operators of ONNX Runtime are compiled from.

    These are the kernels that they call as in their library, without OpenMP.
    """
    kernels = [unit for unit in units(targets, extra) if unit.source.name in _IN_ONNXRUNTIME]
    serial = (*extra, "-I", str(ONNXRUNTIME / "serial"), "-Wno-unknown-pragmas")
    operators = [Unit(source, tuple(extra)) for source in sorted(ONNXRUNTIME.glob("*.cpp"))]
    return [*operators, Unit(SOURCES / _COMMON, serial), *kernels]


def build_onnxruntime(path: Path, objects: Path, targets: Sequence[str] | None = None) -> Path:
    """Build the operators of ONNX Runtime, by default for every instruction set.

    So the library serves on other machines too.

    Raises `KernelError` as `build` does.
    """
    return build(
        path, onnxruntime_units(compiled_targets() if targets is None else targets), objects, ONNXRUNTIME_LINK
    )


def fingerprint(parts: Sequence[Unit]) -> str:
    """Identifies a library by what it is compiled from."""
    return hashlib.sha256("".join(unit.key for unit in parts).encode()).hexdigest()[:20]


def build(path: Path, parts: Sequence[Unit], objects: Path, link: Sequence[str] = ()) -> Path:
    """Compile and link to `path`, written under a temporary name and renamed.

    `link` are further flags of the linker. Objects are kept in the folder `objects` and used again; one
    process builds at a time.  Raises `KernelError` without a compiler or where it fails, with what it said.
    """
    cxx = compiler()
    if cxx is None:
        raise KernelError(
            "there is no C++ compiler to build the kernels with; install g++ or clang, or set CXX"
        )
    objects.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(objects / "lock"):
        if path.exists():
            return path
        made = [objects / f"{unit.source.stem}_{unit.key}.o" for unit in parts]

        def compile_unit(unit: Unit, target: Path) -> None:
            if not target.exists():
                _run([cxx, *FLAGS, *unit.flags, "-c", str(unit.source)], target)

        missing = sum(not target.exists() for target in made)
        if missing:
            _LOG.warning(
                "compiling %d files of tdpass's kernels, once for this machine, to %s", missing, path.parent
            )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, parts, made))
        _run([cxx, "-shared", "-fopenmp", *map(str, made), *link], path)
    return path


def own_folder(folder: Path) -> Path:
    """A folder for what will be loaded as code, made for the user alone.

    Raises `KernelError` as `trusted` does.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise KernelError(
            f"cannot make the folder {folder}: {error.strerror}; name another in TDPASS_KERNELS"
        ) from None
    return _of_the_user(folder)


def trusted(library: Path) -> Path:
    """A library in a cache folder, where there is one.

    Raises `KernelError` unless it and its folder are the user's and nobody else may write there.
    """
    if library.exists():
        _of_the_user(_of_the_user(library.parent).parent)
        _of_the_user(library)
    return library


def _of_the_user(place: Path) -> Path:
    state = place.stat()
    if state.st_uid != os.geteuid():
        raise KernelError(
            f"{place} belongs to another user, so no code is loaded from there; name a folder of your own "
            "in TDPASS_KERNELS"
        )
    if state.st_mode & _BY_OTHERS:
        raise KernelError(
            f"others may write to {place}, so no code is loaded from there; delete it, or name a folder of "
            "your own in TDPASS_KERNELS"
        )
    return place


def _run(command: Sequence[str], target: Path) -> None:
    """Run a compiler that writes `target`, which appears only when it is whole."""
    with folder_beside(target) as folder:
        made = folder / target.name
        done = subprocess.run(  # noqa: S603
            [*command, "-o", str(made)], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if done.returncode:
            lines = (
                [line for line in done.stderr.splitlines() if "error" in line]
                or done.stderr.splitlines()
                or ["it said nothing"]
            )
            raise KernelError(
                f"{command[0]} could not make {target.name}: {lines[0]}; the plain chain serves meanwhile"
            )
        made.chmod(made.stat().st_mode & ~_BY_OTHERS)
        made.replace(target)


def _with_headers(source: Path) -> list[Path]:
    """The source and the headers beside it that it includes, however deep."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():
            found[path] = None
            names = re.findall(r'^\s*#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
            waiting += [folder / name for name in names for folder in (path.parent, SOURCES)]
    return sorted({path.resolve() for path in found})


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
