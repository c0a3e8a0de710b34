"""Fuzzing of what reads files: `python tests/fuzz_loaders.py onnx --seconds 30`, or `make fuzz` for all.

Guided by coverage where atheris is installed, else the seeded damage of `mutations`.  It starts from the
files in tests/corpus, and whatever ends in another exception than a `TdpassError` ends it, its input written
beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import damaged_bytes

try:
    atheris: Any = importlib.import_module("atheris")
except ImportError:
    atheris = None
with contextlib.nullcontext() if atheris is None else atheris.instrument_imports(include=["tdpass"]):
    import tdpass.artifact
    from tdpass.arrays import read_arrays
    from tdpass.errors import TdpassError
    from tdpass.models.onnx.model import OnnxModel

CORPUS = Path(__file__).parent / "corpus"
_ROUND = 50


def read_model(path: Path) -> None:
    """What `tdpass inspect` reads of an ONNX file."""
    model = OnnxModel.open(path)
    model.check_weights()
    for site in model.sites():
        model.weight(site.name)


LOADERS: dict[str, Callable[[Path], object]] = {
    "onnx": read_model,
    "json": tdpass.artifact.load_plan,
    "safetensors": tdpass.artifact.load_plan,
    "npz": read_arrays,
}


def seeds(kind: str) -> list[bytes]:
    """The corpus of one kind of file."""
    return [path.read_bytes() for path in sorted((CORPUS / kind).iterdir())]


def feed(kind: str, content: bytes, path: Path) -> None:
    """Read one input; keeps it in the corpus where it ends in another exception than a `TdpassError`."""
    path.write_bytes(content)
    try:
        with contextlib.suppress(TdpassError):
            LOADERS[kind](path)
    except Exception:
        kept = CORPUS / kind / hashlib.sha256(content).hexdigest()[:16]
        kept.write_bytes(content)
        sys.stderr.write(f"{kept} ends in an exception that is no TdpassError\n")
        raise


def by_seed(kind: str, seconds: float, path: Path) -> int:
    """Feed seeded damage of the corpus for that long; returns how many inputs were read."""
    end, read = time.monotonic() + seconds, 0
    for seed in itertools.count():
        for whole in seeds(kind):
            for broken in damaged_bytes(whole, _ROUND, seed):
                if time.monotonic() > end:
                    return read
                feed(kind, broken, path)
                read += 1
    raise AssertionError


def by_coverage(kind: str, seconds: int, path: Path) -> None:
    """Hand over to atheris, which ends the process."""
    grown = Path(shutil.copytree(CORPUS / kind, path.parent / "corpus"))
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            "-timeout=20",
            "-rss_limit_mb=2048",
            f"-artifact_prefix={CORPUS / kind}{os.sep}",
            str(grown),
        ],
        lambda content: feed(kind, content, path),
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=LOADERS)
    parser.add_argument("--seconds", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"input.{arguments.kind}"
        if atheris is None:
            read = by_seed(arguments.kind, arguments.seconds, path)
            sys.stderr.write(
                f"{read} inputs read; atheris is not installed, so none were guided by coverage\n"
            )
        else:
            by_coverage(arguments.kind, arguments.seconds, path)


if __name__ == "__main__":
    main()
