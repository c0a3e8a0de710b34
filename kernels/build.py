"""Compiles the C++ kernels: one shared library that holds every instruction set, with nothing but a C++ compiler."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tdpass.errors import KernelError

SOURCES = Path(__file__).parent / "cpu"
LIBRARY = "libtdpass_cpu.so"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi")
TARGETS: dict[str, tuple[str, ...]] = {"generic": ()}
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS = {
        "generic": ("-march=x86-64-v2",),
        "avx2": ("-march=x86-64-v3",),
        "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    }
_COMMON = "dispatch.cpp"
_SECONDS = 600


def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++, clang++ or c++, whichever is found first."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    return None


def fingerprint(extra: Sequence[str] = ()) -> str:
    """Identifies the sources, the flags and the compiler."""
    state = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[hc]*")):
        state.update(path.name.encode() + path.read_bytes())
    state.update(repr((FLAGS, TARGETS, tuple(extra), compiler(), platform.machine())).encode())
    return state.hexdigest()[:20]


def build(path: Path, extra: Sequence[str] = ()) -> Path:
    """Compile the kernels to `path`, written under a temporary name and renamed; `extra` are further flags.

    Raises `KernelError` without a compiler or where it fails, with what it said.
    """
    cxx = compiler()
    if cxx is None:
        raise KernelError("there is no C++ compiler to build the kernels with; install g++ or clang, or set CXX")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        jobs = [([cxx, *FLAGS, *extra, "-fopenmp", "-c", str(SOURCES / _COMMON)], Path(folder) / "dispatch.o")]
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.name != _COMMON:
                for target, flags in TARGETS.items():
                    command = [cxx, *FLAGS, *flags, *extra, f"-DTDPASS_TARGET={target}", "-c", str(source)]
                    jobs.append((command, Path(folder) / f"{source.stem}_{target}.o"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: _run([*job[0], "-o", str(job[1])]), jobs))
        made = Path(folder) / path.name
        _run([cxx, "-shared", "-fopenmp", *extra, *(str(target) for _, target in jobs), "-o", str(made)])
        made.replace(path)
    return path


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["it said nothing"]
        raise KernelError(f"{command[0]} could not compile {Path(command[-3]).name}: {lines[0]}; the plain chain serves meanwhile")

