"""The test models of onnx itself, one per operator and the light networks, through `inspect` and `compress`.

    python -m benchmarks.bench_onnx_models [--match TEXT] [--seconds S] [--light]

What an operator's test feeds in beside its first input becomes an initializer, as weights are.  Outcomes:
`right` where the compressed model passes onnx's checks, is no larger than asked and, with a budget that
changes nothing, answers as the test says; `declined` where tdpass refuses or has nothing to change, with
the reason; `failed` for anything else.  Rows go to results/onnx_models.csv, one per operator or network as
soon as it is through; those that have one are left out.  Ends with exit code 1 where one failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test import loader
from onnxruntime import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    RuntimeException,
)
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Unserved

import tdpass
from benchmarks.results import Table
from tdpass.errors import TdpassError

COLUMNS = ("model", "kind", "cases", "right", "declined", "failed", "sites", "reason")
TOLERANCE = 1e-3
Case = tuple[str, onnx.ModelProto, list[Any]]
NOT_RUN = (Fail, InvalidArgument, InvalidGraph, Unserved, RuntimeException)


@dataclass
class Tally:
    """The cases of one operator or network."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    sites: int = 0

    def row(self) -> dict[str, Any]:
        """What the table says of it."""
        said = self.reasons.most_common(1)[0][0] if self.reasons else ""
        counts = {name: self.outcomes[name] for name in ("right", "declined", "failed")}
        return {
            "kind": self.kind,
            "cases": sum(counts.values()),
            **counts,
            "sites": self.sites,
            "reason": said[:200],
        }


def with_weights(model: onnx.ModelProto, inputs: list[Any]) -> tuple[onnx.ModelProto, list[Any]]:
    """The model with its floating-point inputs but the first as initializers, and the inputs left."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    kept, values = [], []
    for index, (entry, value) in enumerate(zip(model.graph.input, inputs, strict=False)):
        if index and isinstance(value, np.ndarray) and value.dtype in (np.float32, np.float64) and value.ndim:
            made.graph.initializer.append(numpy_helper.from_array(value, entry.name))
        else:
            kept.append(entry)
            values.append(value)
    del made.graph.input[:]
    made.graph.input.extend(kept)
    return made, values


def answers(model: onnx.ModelProto, values: list[Any]) -> list[Any] | None:
    """What ONNX Runtime answers; None where it has no such operator."""
    try:
        session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return list(
            session.run(None, dict(zip([entry.name for entry in session.get_inputs()], values, strict=False)))
        )
    except NOT_RUN:
        return None


def judged(model: onnx.ModelProto, values: list[Any], tally: Tally) -> tuple[str, str]:
    """The outcome of one case and what is said of it."""
    before = answers(model, values)
    try:
        opened = tdpass.open_model(model)
        tally.sites += len(opened.sites())
        same = tdpass.compress(
            model, {"params": 1.0}, effort="fast", progress=False, cache=False, strict=False
        )
        small = tdpass.compress(
            model, {"params": 0.9}, effort="fast", progress=False, cache=False, strict=False
        )
    except TdpassError as error:
        return "declined", str(error).partition(";")[0]
    except Exception as error:  # noqa: BLE001 - what is no clear refusal is the finding
        return "failed", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    for made in (same.model, small.model):
        try:
            onnx.checker.check_model(made)
        except onnx.checker.ValidationError as error:
            return "failed", f"checker: {next(iter(str(error).splitlines()), '')}"
    if small.report.final.params > 0.9 * small.report.original.params:
        return "failed", f"{small.report.final.params} parameters of {small.report.original.params}"
    after = None if before is None else answers(same.model, values)
    if before is not None and (after is None or not all(map(close, before, after))):
        return "failed", "a budget that changes nothing changed the answer"
    return "right", ""


def close(one: Any, other: Any) -> bool:
    """Whether two outputs are the same up to rounding."""
    return (
        not isinstance(one, np.ndarray)
        or one.dtype.kind != "f"
        or np.allclose(one, other, TOLERANCE, TOLERANCE, equal_nan=True)
    )


def node_cases(match: str) -> Iterator[Case]:
    """The tests of single operators: which operator, the model with weights, and what is left to feed in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = loader.load_model_tests(kind="node")
    for case in sorted(cases, key=_operator):
        if match in case.name and case.model is not None and case.data_sets:
            inputs = [value if isinstance(value, np.ndarray) else None for value in case.data_sets[0][0]]
            yield _operator(case), *with_weights(case.model, inputs)


def _operator(case: Any) -> str:
    return "" if case.model is None else str(case.model.graph.node[-1].op_type)


def light_models() -> Iterator[Case]:
    """Published networks whose weights are filled with constants."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(path)
        held = {tensor.name for tensor in model.graph.initializer}
        entry = next(entry for entry in model.graph.input if entry.name not in held)
        sizes = [size.dim_value or 1 for size in entry.type.tensor_type.shape.dim]
        yield path.stem, model, [np.random.default_rng(0).random(sizes, dtype=np.float32)]


def main() -> int:
    """Go through all that match, as far as the time goes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="only tests with this in their name")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--light", action="store_true", help="the light networks instead of the operators")
    arguments = parser.parse_args()
    table, start, outcomes = Table("onnx_models.csv", COLUMNS), time.perf_counter(), Counter[str]()
    kind, cases = (
        ("network", light_models()) if arguments.light else ("operator", node_cases(arguments.match))
    )
    for name, group in groupby(cases, key=itemgetter(0)):
        if table.has(model=name, kind=kind):
            continue
        if time.perf_counter() - start > arguments.seconds:
            print("the time is over; what is left was not tried")
            break
        tally = tried(kind, group, loud=arguments.light)
        outcomes += tally.outcomes
        table.add(model=name, **tally.row())
    print(outcomes)
    return int(outcomes["failed"] > 0)


def tried(kind: str, cases: Iterable[Case], *, loud: bool) -> Tally:
    """What became of all cases of one operator, or of one network."""
    tally = Tally(kind)
    for name, model, values in cases:
        outcome, said = judged(model, values, tally)
        tally.outcomes[outcome] += 1
        if said:
            tally.reasons[f"{outcome}: {said}"] += 1
        if outcome == "failed" or loud:
            print(name, outcome, said, flush=True)
    return tally


if __name__ == "__main__":
    sys.exit(main())
