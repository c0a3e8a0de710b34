"""Trained small networks by the time they take: all of them and the dense one timed in turn, in one process.

    TDPASS_DATA=... python -m benchmarks.bench_trained haloc=out/haloc lc=out/lc   # results/trained.csv

Each folder is one that `bench_training` or `tdpass train` left: `model.safetensors` and `report.json`.
Accuracies are those of its report, on all test images, before its fine-tuning and at the end.  Milliseconds are
medians of one batch on one thread, batch-norms folded, in eager torch with factored layers fused where that is
faster, and as a plain chain in ONNX Runtime; `dense_milliseconds` is the dense network in the same runtime.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import tdpass
from benchmarks import cifar
from benchmarks.nets import exported
from benchmarks.results import FOLDER, Table, Value, show
from tdpass.clock import interleaved, threads_of_torch
from tdpass.models import Batch, open_model
from tdpass.models.abilities import FoldsBatchNorm, FusesChains
from tdpass.report import Report
from tdpass.targets.runtimes import RUNTIMES

COLUMNS = (
    "model",
    "method",
    "epochs",
    "before_finetuning",
    "accuracy",
    "macs_fraction",
    "batch",
    "runtime",
    "milliseconds",
    "dense_milliseconds",
    "over_dense",
)
IN_RUNTIMES = ("eager", "onnxruntime")
Calls = dict[str, Callable[[], object]]


def calls_of(module: nn.Module, x: Tensor) -> Calls:
    """One call of the network in each runtime."""
    innermost = Batch((x.contiguous(memory_format=torch.channels_last),), {})
    opened = open_model(module.eval(), x[:2]).clone()
    assert isinstance(opened, FoldsBatchNorm)
    opened.fold_batchnorm()
    folded = opened.unwrap()
    assert isinstance(folded, nn.Module)
    graph = open_model(exported(folded, x), None)
    assert isinstance(opened, FusesChains)
    opened.fuse(lambda text: None, lambda name, reason: None, innermost)
    found: Calls = {}
    for name, model in zip(IN_RUNTIMES, (opened, graph), strict=True):
        call = RUNTIMES.get(name).prepare_model(model, Batch((x,), {}), 1)
        if call is not None:
            found[name] = call
    return found


def measured(network: str, folders: dict[str, Path], batch: int, rounds: int) -> list[dict[str, Value]]:
    """A row for every network and runtime."""
    x = cifar.data().prepared(cifar.data().test.inputs[:batch])
    dense = cifar.load_resnet(network)
    every = {"dense": calls_of(dense, x)}
    for method, folder in folders.items():
        module = tdpass.load(folder / "model.safetensors", cifar.load_resnet(network))
        every[method] = calls_of(module, x)
    names = [(method, runtime) for method, calls in every.items() for runtime in calls]
    with torch.inference_mode(), threads_of_torch(1):
        times = interleaved([every[method][runtime] for method, runtime in names], rounds)
    seconds = {name: statistics.median(found) for name, found in zip(names, times, strict=True)}
    rows = []
    for method, runtime in names:
        if method == "dense":
            continue
        report = Report.load(folders[method] / "report.json")
        own, whole = seconds[method, runtime], seconds["dense", runtime]
        row: dict[str, Value] = {"model": network, "method": method, "batch": batch, "runtime": runtime}
        row |= {"epochs": sum(entry.stage in ("method", "finetune") for entry in report.training)}
        row |= {"before_finetuning": report.checks.get("score_before_finetuning")}
        row |= {"accuracy": report.checks["score_final"]}
        row |= {"macs_fraction": report.final.macs / report.original.macs}
        row |= {"milliseconds": 1e3 * own, "dense_milliseconds": 1e3 * whole, "over_dense": whole / own}
        rows.append(row)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="METHOD=FOLDER")
    parser.add_argument("--network", default="resnet20", choices=list(cifar.DENSE_ACCURACY))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=FOLDER / "trained.csv")
    options = parser.parse_args()
    folders = {method: Path(folder) for method, _, folder in (run.partition("=") for run in options.runs)}
    for folder in folders.values():
        if not (folder / "model.safetensors").exists():
            raise SystemExit(
                f"{folder} holds no model.safetensors; give METHOD=FOLDER of a finished training run"
            )
    table = Table(options.out, COLUMNS)
    rows = measured(options.network, folders, options.batch, options.rounds)
    for row in rows:
        table.add(**row)
    print(show(rows, COLUMNS))


if __name__ == "__main__":
    main()
