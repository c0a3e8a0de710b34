"""Trained small networks by the time they take, each timed in turn with the dense one.

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
PREPARED = 5  # times anew, as where tensors come to lie in memory moves eager torch by a tenth
IN_RUNTIMES = ("eager", "onnxruntime")


def call_of(module: nn.Module, x: Tensor, runtime: str) -> Callable[[], object]:
    """One call of the network in a runtime; raises where that does not run it."""
    opened = open_model(module.eval(), x[:2]).clone()
    assert isinstance(opened, FoldsBatchNorm)
    opened.fold_batchnorm()
    if runtime == "eager":
        assert isinstance(opened, FusesChains)
        innermost = Batch((x.contiguous(memory_format=torch.channels_last),), {})
        opened.fuse(lambda text: None, lambda name, reason: None, innermost)
    else:
        folded = opened.unwrap()
        assert isinstance(folded, nn.Module)
        opened = open_model(exported(folded, x), None)
    call = RUNTIMES.get(runtime).prepare_model(opened, Batch((x,), {}), 1)
    if call is None:
        raise SystemExit(f"{runtime} does not run {type(module).__name__}")
    return call


def measured(network: str, method: str, folder: Path, batch: int, rounds: int) -> list[dict[str, Value]]:
    """A row for every runtime; no other network is held meanwhile, as memory that is full slows all down."""
    x = cifar.data().prepared(cifar.data().test.inputs[:batch])
    dense = cifar.load_resnet(network)
    module = tdpass.load(folder / "model.safetensors", cifar.load_resnet(network))
    report, rows = Report.load(folder / "report.json"), []
    for runtime in IN_RUNTIMES:
        with torch.no_grad(), threads_of_torch(1):
            runs = [
                interleaved([call_of(net, x, runtime) for net in (module, dense)], rounds)
                for _ in range(PREPARED)
            ]
        own, whole = (statistics.median(statistics.median(run[which]) for run in runs) for which in (0, 1))
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=FOLDER / "trained.csv")
    options = parser.parse_args()
    folders = {method: Path(folder) for method, _, folder in (run.partition("=") for run in options.runs)}
    for folder in folders.values():
        if not (folder / "model.safetensors").exists():
            raise SystemExit(
                f"{folder} holds no model.safetensors; give METHOD=FOLDER of a finished training run"
            )
    table = Table(options.out, COLUMNS)
    for method, folder in folders.items():
        rows = measured(options.network, method, folder, options.batch, options.rounds)
        for row in rows:
            table.add(**row)
        print(show(rows, COLUMNS), flush=True)


if __name__ == "__main__":
    main()
