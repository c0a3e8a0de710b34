"""tdpass doctor: what of tdpass is in use on this machine, what is missing, and what to do about it."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tdpass.cli.arguments import Verbs, add_verb
from tdpass.cli.output import Output
from tdpass.errors import KernelError
from tdpass.kernels import binding, build, native
from tdpass.kernels.base import IMPLEMENTATIONS, compiled
from tdpass.views.tables import Part, grid, heading, pairs

_PACKAGES = {
    "torch": "",
    "onnxruntime": "",
    "onnxscript": "to deploy torch models as ONNX, pip install onnxscript",
    "openvino": "to plan for OpenVINO, pip install openvino",
    "triton": "for kernels on a GPU, install torch for CUDA, which brings triton",
}
_BUILD = "`tdpass doctor --build`"


@dataclass(frozen=True)
class Library:
    """A library of kernels: where it lies or would lie, whether it is there, and what it is for."""

    name: str
    purpose: str
    path: str
    there: bool


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(
        verbs,
        "doctor",
        run,
        "show what is in use on this machine and what is missing",
        "tdpass doctor --build",
    )
    parser.add_argument(
        "--build",
        action="store_true",
        help="build now what would be built on first use, and the binding that makes calls cheap",
    )


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Look, and change nothing unless asked to build; fails where there are no native kernels."""
    failures = _build() if arguments.build else {}
    asked = os.environ.get("TDPASS_ISA", "")
    try:
        isa = native.chosen_isa()
        libraries = _libraries(isa)
    except KernelError as error:
        isa, libraries, failures = "none", [], {**failures, "kernels": str(error)}
    packages = {name: _version(name) for name in _PACKAGES}
    native_cpu = bool(libraries) and (libraries[0].there or build.compiler() is not None)
    operators = [
        {
            "name": op.name,
            "cpu": _way(op.name, "cpu", native_cpu),
            "cuda": _way(op.name, "cuda", available=True),
        }
        for op in binding.all_operators()
    ]
    advice = [*failures.values(), *_advice(libraries, packages)]
    facts = {
        "tdpass": _version("tdpass") or "not installed",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "instruction set": isa + (" (as TDPASS_ISA asks)" if asked and isa == asked else ""),
        "compiler": (_compiler() or "none") + _left_out(),
        "cache": str(native.cache_folder()),
        "for ONNX Runtime": next(
            (library.path for library in libraries if library.name == "onnxruntime" and library.there),
            "not built yet",
        ),
    }

    def view(width: int | None) -> list[Part]:
        rows = [
            (library.name, "built" if library.there else "not built", library.purpose)
            for library in libraries
        ]
        return [
            pairs(facts.items()),
            "",
            grid(
                ("Operator", "CPU", "CUDA"),
                [(row["name"], row["cpu"], row["cuda"]) for row in operators],
                width,
            ),
            "",
            grid(("Library", "State", "For"), rows, width, wraps=(2,)),
            "",
            grid(
                ("Package", "Version"),
                [(name, found or "missing") for name, found in packages.items()],
                width,
            ),
            "",
            heading("What to do"),
            *(advice or ["nothing: all is there"]),
        ]

    document = {
        **{name.replace(" ", "_"): value for name, value in facts.items()},
        "operators": operators,
        "packages": packages,
        "advice": advice,
    }
    out.show(
        {
            **document,
            "binding_in_use": bool(compiled()),
            "libraries": [asdict(library) for library in libraries],
        },
        view,
    )
    return 0 if libraries and not failures else 1


def _build() -> dict[str, str]:
    """Build everything; what could not be, with the reason."""
    failures: dict[str, str] = {}
    if native.library() is None:
        failures["kernels"] = native.missing()
    steps: dict[str, Callable[[], object]] = {
        "binding": lambda: (binding.build(), binding.load()),
        "onnxruntime": native.onnx_ops_path,
    }
    for name, step in steps.items():
        try:
            step()
        except KernelError as error:
            failures[name] = str(error)
    return failures


def _libraries(isa: str) -> list[Library]:
    cache = native.cache_folder()
    core = build.SOURCES / build.LIBRARY
    if not core.exists():
        core = cache / build.fingerprint(build.units([isa])) / build.LIBRARY
    ops = build.ONNXRUNTIME / build.ONNXRUNTIME_LIBRARY
    if not ops.exists():
        ops = cache / build.fingerprint(build.onnxruntime_units([isa])) / build.ONNXRUNTIME_LIBRARY
    found = [
        ("kernels", "native operators on the CPU; built on first use", core),
        ("binding", "cheap calls from Python, and deployed models", binding.path()),
        ("onnxruntime", "the operators in ONNX Runtime; built on first use", ops),
    ]
    return [Library(name, purpose, str(path), path.exists()) for name, purpose, path in found]


def _way(name: str, device: str, available: bool) -> str:
    """How a device runs an operator."""
    if device == "cpu" and name in compiled():
        return "C++"
    return "native" if available and (name, device) in IMPLEMENTATIONS else "plain torch"


def _advice(libraries: list[Library], packages: dict[str, str]) -> list[str]:
    absent = [library.name for library in libraries if not library.there]
    lines = []
    if absent and build.compiler() is None:
        lines.append(
            f"{', '.join(absent)}: there is no C++ compiler; install g++ or clang, or set CXX; plain torch "
            "serves meanwhile"
        )
    elif absent:
        lines.append(f"{', '.join(absent)}: not built yet; {_BUILD} builds them now")
    return [
        *lines,
        *(f"{name}: missing; {hint}" for name, hint in _PACKAGES.items() if hint and not packages[name]),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _left_out() -> str:
    """The better instruction sets of this machine that the compiler cannot be used for."""
    missing = [target for target in build.machine_targets() if not build.compiles(target)]
    return f" (too old for {', '.join(missing)})" if missing else ""


def _compiler() -> str:
    name = build.compiler()
    if name is None:
        return ""
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        said = subprocess.run(  # noqa: S603
            [name, "--version"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
        return f"{Path(name).name}: {said.splitlines()[0]}"
    return name
