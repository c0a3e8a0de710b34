"""Families of timm and transformers, compressed to 0.6 of the parameters.

Each is trained a step, saved, loaded and exported.

They are made from configurations, so that nothing is fetched; the ONNX export is run and compared.

    python -m benchmarks.bench_families [NAME ...]

Rows go to results/families.csv: `ok`, or the first line of what was said where a step failed; families that
have a row are left out.  `onnx` says `as dense` where the dense network does not export either.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import tdpass
from benchmarks.families import FAMILIES, Family, Inputs, available
from benchmarks.results import Table, show

BUDGET = 0.6
COLUMNS = (
    "family", "library", "params", "left", "sites", "trained", "loaded", "onnx", "difference_onnx"
)  # fmt: skip
TOLERANCE, ROUNDING = 1e-4, 1e-6


def first_output(model: nn.Module, inputs: Inputs) -> Tensor:
    """The first tensor of what a model answers."""
    answer: Any = model(**inputs)
    if isinstance(answer, Tensor):
        return answer
    values = answer.values() if isinstance(answer, Mapping) else answer
    return next(value for value in values if isinstance(value, Tensor))


def outcome(step: Callable[[], str]) -> str:
    """What a step says, or the first line of its error."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - whatever fails is the row
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:160]


def trained(model: nn.Module, inputs: Inputs) -> str:
    """One step of training: every factor has a gradient, and the answer moves."""
    before = first_output(model, inputs).detach()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    first_output(model, inputs).square().mean().backward()
    factors = [
        f"{name}.{leaf}"
        for name, layer in model.named_modules()
        if type(layer).__name__ == "Factorized"
        for leaf, factor in layer.named_parameters(recurse=False)
        if factor.requires_grad and factor.grad is None
    ]
    optimizer.step()
    if factors:
        return f"no gradient: {factors[0]}"
    moved = float((first_output(model, inputs).detach() - before).abs().max())
    return "ok" if 0 < moved < float("inf") else f"the answer moved by {moved}"


def loaded(artifact: tdpass.Artifact[Any], family: Family, path: Path) -> str:
    """Saved, and loaded onto the dense class."""
    artifact.save(path)
    again = tdpass.load(path, family.build())
    with torch.no_grad():
        gap = (
            (first_output(again, family.inputs()) - first_output(artifact.model, family.inputs())).abs().max()
        )
    return (
        "ok" if float(gap) < ROUNDING else f"differs by {float(gap):.2g}"
    )  # tensors may lie otherwise in memory


def exported(model: nn.Module, inputs: Inputs, path: Path) -> tuple[str, float]:
    """Exported to ONNX, and how far ONNX Runtime's answer is, relative to the largest number in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (), path, kwargs=dict(inputs), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    values = dict(zip(names, (value.numpy() for value in inputs.values()), strict=False))
    answer = torch.from_numpy(session.run(None, values)[0])
    with torch.no_grad():
        wanted = first_output(model, inputs)
    gap = float((answer - wanted).abs().max() / wanted.abs().max())
    return ("ok" if gap < TOLERANCE else "differs"), gap


def measure(family: Family) -> dict[str, str | float | int | None]:
    """One row."""
    model, inputs = family.build(), family.inputs()
    artifact = tdpass.compress(
        model, {"params": BUDGET}, dict(inputs), effort="fast", progress=False, cache=False, strict=False
    )
    original, final = artifact.report.original.params, artifact.report.final.params
    row: dict[str, str | float | int | None] = {
        "params": int(original), "left": final / original, "sites": len(artifact.plan.choices)
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        row["loaded"] = outcome(lambda: loaded(artifact, family, Path(folder) / "model.safetensors"))

        def onnx() -> str:
            said, row["difference_onnx"] = exported(artifact.model, inputs, Path(folder) / "model.onnx")
            return said

        row["onnx"] = outcome(onnx)
        if row["onnx"] not in ("ok", "differs") and not exports(family, Path(folder) / "dense.onnx"):
            row["onnx"] = f"as dense: {row['onnx']}"[:160]
    row["trained"] = outcome(lambda: trained(artifact.model, inputs))
    return row


def exports(family: Family, path: Path) -> bool:
    """Whether the dense network can be exported to ONNX."""
    return outcome(lambda: exported(family.build(), family.inputs(), path)[0]) == "ok"


def main() -> None:
    """Measure what was named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(FAMILIES), metavar="NAME")
    table = Table("families.csv", COLUMNS)
    for name in parser.parse_args().names:
        family = FAMILIES[name]
        if table.has(family=name):
            continue
        if missing := available(family.library):
            print(f"{name} is left out: {family.library} does not import ({missing})")
            continue
        try:
            row = measure(family)
        except Exception as error:  # noqa: BLE001 - as above
            row = {"loaded": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]}
        table.add(family=name, library=family.library, **row)
        print(name, row, flush=True)
    print(show(table.rows, COLUMNS))


if __name__ == "__main__":
    main()
