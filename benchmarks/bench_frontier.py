r"""Accuracy against measured time: every method of tdpass without training, and the peers, on one network.

    TDPASS_DATA=... python -m benchmarks.bench_frontier           # results/frontier.csv, and the figure
    TDPASS_DATA=... python -m benchmarks.bench_frontier --images 200 --methods dense balf --budgets 0.5 \
        --out /tmp/a.csv
    TDPASS_DATA=... python -m benchmarks.bench_frontier --resume  # goes on from there, at the same commit
    python -m benchmarks.bench_frontier --draw                    # docs/frontier.svg anew from these rows

Networks that were trained are drawn too, from the eager rows of results/trained.csv (`bench_trained`).

Milliseconds are the median of eager torch on one batch of 64 images, channels last, batch-norms folded,
with the dense network timed in turn.  Accuracy is on the first `--images` test images, evenly spaced, after
batch-norm statistics were estimated anew for the peers, which need it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import tdpass
from benchmarks import cifar, peers
from benchmarks.frontier_figure import TRAINED, draw
from benchmarks.results import FOLDER, Table, Value, show
from tdpass.clock import interleaved
from tdpass.files import write_text
from tdpass.models import open_model
from tdpass.models.abilities import FoldsBatchNorm

COLUMNS = (
    "model",
    "method",
    "budget",
    "images",
    "accuracy",
    "macs_fraction",
    "milliseconds",
    "dense_milliseconds",
)
PLOT = Path(__file__).parents[1] / "docs" / "frontier.svg"
BATCH, ROUNDS = 64, 9
Made = Callable[[str, float, str], nn.Module]
_REPAIR = "correct-bias,refit,recalibrate-batchnorm,verify"


def _pipeline(text: str) -> Made:
    def make(name: str, budget: float, effort: str) -> nn.Module:
        steps = f"fold-batchnorm,{text},{_REPAIR}".replace("BUDGET", f"{budget:g}")
        artifact = tdpass.compress(
            cifar.load_resnet(name),
            {"macs": budget},
            cifar.calibration(),
            pipeline=steps,
            effort=effort,
            strict=False,
        )
        assert isinstance(artifact.model, nn.Module)
        return artifact.model

    return make


def _peer(method: str) -> Made:
    def make(name: str, budget: float, effort: str) -> nn.Module:
        ((_, model, _),) = peers.METHODS[method](name, [budget])
        return cifar.recalibrate_batchnorm(model).eval()

    return make


METHODS: Mapping[str, Made] = {
    "dense": lambda name, budget, effort: cifar.load_resnet(name),
    "tdpass": _pipeline("plan,factorize"),
    "tdpass pivot": _pipeline("plan{pivot=true},factorize"),
    "tdpass channels": _pipeline("project-channels{macs=BUDGET}"),
    "tdpass channels and factors": _pipeline("project-channels{keep=0.8},plan,factorize"),
    **{f"peer {method}": _peer(method) for method in peers.METHODS},
}


def measured(name: str, method: str, budget: float, model: nn.Module, images: int) -> dict[str, Value]:
    """One row."""
    test = cifar.data().test
    places = torch.linspace(0, len(test.targets) - 1, images).long()
    x, targets = cifar.data().prepared(test.inputs[places]), test.targets[places]
    net = model.eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        right = sum(
            int((net(part).argmax(1) == wanted).sum())
            for part, wanted in zip(x.split(256), targets.split(256), strict=True)
        )
        dense = _folded(cifar.load_resnet(name), x[:BATCH])
        call = x[:BATCH].to(memory_format=torch.channels_last)
        folded = _folded(net, x[:BATCH])
        times = interleaved([lambda: folded(call), lambda: dense(call)], ROUNDS)
    own, whole = (statistics.median(seconds) for seconds in times)
    full = cifar.macs(cifar.load_resnet(name))
    return {
        "model": name,
        "method": method,
        "budget": budget,
        "images": images,
        "accuracy": 100 * right / images,
        "macs_fraction": cifar.macs(model) / full,
        "milliseconds": 1e3 * own,
        "dense_milliseconds": 1e3 * whole,
    }


def _folded(model: nn.Module, x: torch.Tensor) -> nn.Module:
    opened = open_model(model, x[:2]).clone()
    assert isinstance(opened, FoldsBatchNorm)
    opened.fold_batchnorm()
    folded = opened.unwrap()
    assert isinstance(folded, nn.Module)
    return folded.eval().to(memory_format=torch.channels_last)


def wanted(methods: Sequence[str], budgets: Sequence[float]) -> list[tuple[str, float]]:
    """Every method at every budget; the dense network once."""
    return [(method, budget) for method in methods for budget in ([1.0] if method == "dense" else budgets)]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", default="resnet20", choices=list(cifar.DENSE_ACCURACY))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5, 0.4])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--effort", default="normal", choices=["fast", "normal", "thorough"])
    parser.add_argument("--out", type=Path, default=FOLDER / "frontier.csv")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the file has a row of, of this commit"
    )
    options = parser.parse_args()
    name, table = options.network, Table(options.out, COLUMNS)
    for method, budget in [] if options.draw else wanted(options.methods, options.budgets):
        key = {"model": name, "method": method, "budget": budget, "images": options.images}
        if options.resume and table.has_of_commit(**key):
            continue
        model = METHODS[method](name, budget, options.effort)
        row = measured(name, method, budget, model, options.images)
        table.add(**row)
        print(show([row], COLUMNS).splitlines()[-1], flush=True)
    latest = {(row["method"], row["budget"]): row for row in _rows(options.out)}
    trained = {
        row["method"]: row
        for row in _rows(FOLDER / "trained.csv")
        if (row["runtime"], row["model"]) == ("eager", name) and row["epochs"] != "0"
    }
    points = [{**row, "method": f"{method}{TRAINED}"} for method, row in trained.items()]
    write_text(options.plot, f"{draw([*latest.values(), *points])}\n")


if __name__ == "__main__":
    main()
