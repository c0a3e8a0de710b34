"""A sentence encoder with narrower streams against one with factored layers, at equal parameters.

The parameters are those of the whole model.

    python -m benchmarks.bench_slices                          # rows in results/slices.csv
    python -m benchmarks.bench_slices --resume --keep 0.75     # what of it has no row at this commit

`slice` stores the streams in a share of their channels (SliceGPT); the others get the number of parameters
that leaves: `svd` factors linear layers, whitened by what they read, `svd pivot` with factors that hold
nothing twice, `slice svd` half of the way narrower, the rest factored.  `slice blocks` is `slice` with a
basis for every residual sum, `slice heads` narrower attention heads, both as narrow as that number asks
for.  Cosines are of embeddings to the dense ones, on held-out sentences; milliseconds are the median of
eager torch over all held-out batches, dense and small in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import tdpass
from benchmarks import minilm
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
    "slice blocks": "slice-residual{bases=block,BOUND},verify",
    "slice heads": "slice-heads{BOUND},verify",
    "svd": f"plan,{REPAIR}",
    "svd pivot": f"plan{{pivot=true}},{REPAIR}",
    "slice svd": f"slice-residual{{keep=HALF}},plan{{pivot=true}},{REPAIR}",
}
ROUNDS = 5


def made(
    dense: nn.Module, method: str, keep: float, params: int, data: Sequence[object]
) -> tdpass.Artifact[nn.Module]:
    """The encoder by that method; `params` are those of the sliced one."""
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
    method: str,
    keep: float,
    artifact: tdpass.Artifact[nn.Module],
    dense: nn.Module,
    held_out: list[minilm.Batch],
) -> dict[str, Value]:
    """Cosines and times of one."""
    small, report = artifact.model, artifact.report

    def call(model: nn.Module) -> Tensor:
        return minilm.embed(model, held_out)

    similarity = (call(small) * call(dense)).sum(1).sort().values
    own, whole = interleaved([lambda: call(small), lambda: call(dense)], ROUNDS)
    return {
        "model": MODEL,
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
    table, dense = Table(options.out, COLUMNS), minilm.load_encoder()
    calibration, held_out = (part[: options.batches] for part in minilm.batches())
    for keep in options.keep:
        params = 0
        for method in options.methods:
            if options.resume and table.has_of_commit(model=MODEL, method=method, keep=keep):
                continue
            if method != "slice" and not params:
                params = made(dense, "slice", keep, 0, calibration).report.final.params
            start = time.perf_counter()
            artifact = made(dense, method, keep, params, calibration)
            seconds = time.perf_counter() - start
            params = artifact.report.final.params if method == "slice" else params
            table.add(seconds=seconds, **measured(method, keep, artifact, dense, held_out))
            print(show(table.rows[-1:], COLUMNS), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
