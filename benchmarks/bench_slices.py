"""A transformer with narrower streams or heads against one with factored layers, at equal parameters.

The parameters are those of the whole model.

    python -m benchmarks.bench_slices                          # sentence encoder: rows in results/slices.csv
    python -m benchmarks.bench_slices --model prenorm-digits   # a small one with norms before each part
    python -m benchmarks.bench_slices --resume --keep 0.75     # what of it has no row at this commit

`slice` stores the streams in a share of their channels (SliceGPT); the others get the number of parameters
that leaves: `svd` factors linear layers, whitened by what they read, `svd pivot` with factors that hold
nothing twice, `slice svd` half of the way narrower, the rest factored.  `slice blocks` is `slice` with a
basis for every residual sum at equal width, `slice blocks equal` at equal parameters; they differ from
`slice` where norms come first.  `slice heads` leaves the share of every attention head, `svd heads` is `svd`
at the parameters of that.  Cosines are of outputs to the dense ones, on held-out data; milliseconds are the
median of eager torch over all held-out batches, dense and small in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdpass
from benchmarks import minilm, prenorm
from benchmarks.results import FOLDER, Table, Value, show
from tdpass.clock import interleaved

COLUMNS = (
    "model",
    "method",
    "keep",
    "params_fraction",
    "macs_fraction",
    "cosine_mean",
    "cosine_5th_percentile",
    "cosine_min",
    "seconds",
    "milliseconds",
    "dense_milliseconds",
)
MODEL = "all-MiniLM-L6-v2"
REPAIR = "factorize,correct-bias,refit,verify"
PIPELINES: Mapping[str, str] = {
    "slice": "slice-residual{keep=KEEP},verify",
    "slice blocks": "slice-residual{bases=block,keep=KEEP},verify",
    "slice blocks equal": "slice-residual{bases=block,BOUND},verify",
    "slice heads": "slice-heads{keep=KEEP},verify",
    "svd heads": f"plan,{REPAIR}",
    "svd": f"plan,{REPAIR}",
    "svd pivot": f"plan{{pivot=true}},{REPAIR}",
    "slice svd": f"slice-residual{{keep=HALF}},plan{{pivot=true}},{REPAIR}",
}
EQUAL_TO: Mapping[str, str] = {"svd heads": "slice heads"}  # whose number of parameters, if not that of slice
ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """A dense model, data to calibrate on and held-out data, and what it answers scaled to length one."""

    dense: nn.Module
    calibration: list[Any]
    held_out: list[Any]
    answers: Callable[[nn.Module, list[Any]], Tensor]


def _sentences() -> Case:
    return Case(minilm.load_encoder(), *minilm.batches(), minilm.embed)


def _digits() -> Case:
    return Case(*prenorm.trained(), prenorm.answers)


CASES: Mapping[str, Callable[[], Case]] = {MODEL: _sentences, prenorm.NAME: _digits}


def made(
    dense: nn.Module, method: str, keep: float, params: int, data: Sequence[object]
) -> tdpass.Artifact[nn.Module]:
    """The model by that method; `params` are those of the one that it is held against."""
    size = f"{params / 1e6:.6f}M"
    filled = {"KEEP": f"{keep:g}", "HALF": f"{(1 + keep) / 2:g}", "BOUND": f"params={size}"}
    steps = PIPELINES[method]
    for name, text in filled.items():
        steps = steps.replace(name, text)
    budget = {"budget": {"params": size}, "formats": ("svd",)} if "plan" in steps else {}
    return tdpass.compress(
        dense,
        data=data,
        pipeline=steps,
        divergence=tdpass.Divergence("cosine"),
        strict=False,
        **budget,
    )


def measured(
    model: str, method: str, keep: float, artifact: tdpass.Artifact[nn.Module], case: Case
) -> dict[str, Value]:
    """Cosines and times of one."""
    small, report = artifact.model, artifact.report

    def call(model: nn.Module) -> Tensor:
        return case.answers(model, case.held_out)

    similarity = (call(small) * call(case.dense)).sum(1).sort().values
    own, whole = interleaved([lambda: call(small), lambda: call(case.dense)], ROUNDS)
    return {
        "model": model,
        "method": method,
        "keep": keep,
        "params_fraction": report.final.params / report.original.params,
        "macs_fraction": report.final.macs / report.original.macs,
        "cosine_mean": float(similarity.mean()),
        "cosine_5th_percentile": float(similarity[len(similarity) // 20]),
        "cosine_min": float(similarity[0]),
        "milliseconds": 1e3 * statistics.median(own),
        "dense_milliseconds": 1e3 * statistics.median(whole),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=MODEL, choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(PIPELINES), choices=list(PIPELINES))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75])
    parser.add_argument(
        "--batches", type=int, help="so many calibration and held-out batches of 64, all without"
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "slices.csv")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the file has a row of, of this commit"
    )
    options = parser.parse_args()
    table, whole = Table(options.out, COLUMNS), CASES[options.model]()
    parts = (part[: options.batches] for part in (whole.calibration, whole.held_out))
    case = Case(whole.dense, *parts, whole.answers)
    for keep in options.keep:
        params: dict[str, int] = {}
        for method in options.methods:
            if options.resume and table.has_of_commit(model=options.model, method=method, keep=keep):
                continue
            other = EQUAL_TO.get(method, "slice")
            bounded = "BOUND" in PIPELINES[method] or "plan" in PIPELINES[method]
            if bounded and other not in params:
                params[other] = made(case.dense, other, keep, 0, case.calibration).report.final.params
            start = time.perf_counter()
            artifact = made(case.dense, method, keep, params.get(other, 0), case.calibration)
            seconds = time.perf_counter() - start
            params[method] = artifact.report.final.params
            table.add(seconds=seconds, **measured(options.model, method, keep, artifact, case))
            print(show(table.rows[-1:], COLUMNS), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
