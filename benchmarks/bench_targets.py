"""Whether the planner's choices are as fast as it says.

Each layer is planned alone by measured time, then timed again.

    python -m benchmarks.bench_targets  # every layer in every runtime, to results/targets.csv
    python -m benchmarks.bench_targets --layers resnet18 --runtimes onnxruntime --threads 2

A layer is planned with about 0.4 of its multiply-adds as the budget, or as little as is faster than dense
where that is more. What was chosen and the dense layer are then measured in turn, in rounds of their own,
nothing being read from the table.  The goal: what was chosen is nowhere more than 3 % slower than dense.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import tdpass
from benchmarks.bench_planner import decaying
from benchmarks.nets import exported
from benchmarks.results import Table, show
from tdpass.form import DENSE
from tdpass.targets import Setting, open_target

COLUMNS = (
    "layer",
    "runtime",
    "threads",
    "batch",
    "budget",
    "format",
    "rank",
    "dense_us",
    "chosen_us",
    "predicted_ratio",
    "measured_ratio",
    "goal",
    "met",
)
GOAL = 1.03
_FRONTENDS = {"eager": "torch", "onnxruntime": "onnx", "openvino": "onnx"}
_BUDGETS = (0.4, 0.6, 0.8, 0.95)

# output channels, input channels, kernel, stride, input size
CONVS = {
    "resnet18": [
        (64, 64, 3, 1, 56),
        (128, 64, 3, 2, 56),
        (128, 128, 3, 1, 28),
        (256, 128, 3, 2, 28),
        (256, 256, 3, 1, 14),
        (512, 256, 3, 2, 14),
        (512, 512, 3, 1, 7),
        (128, 64, 1, 2, 56),
        (256, 128, 1, 2, 28),
        (512, 256, 1, 2, 14),
    ],
    "resnet20": [
        (16, 16, 3, 1, 32),
        (32, 16, 3, 2, 32),
        (32, 32, 3, 1, 16),
        (64, 32, 3, 2, 16),
        (64, 64, 3, 1, 8),
    ],
    "resnet50": [
        (64, 256, 1, 1, 56),
        (256, 64, 1, 1, 56),
        (128, 512, 1, 1, 28),
        (512, 128, 1, 1, 28),
        (256, 1024, 1, 1, 14),
        (1024, 256, 1, 1, 14),
        (512, 2048, 1, 1, 7),
        (2048, 512, 1, 1, 7),
    ],
    "vgg": [
        (128, 64, 3, 1, 112),
        (128, 128, 3, 1, 112),
        (256, 128, 3, 1, 56),
        (256, 256, 3, 1, 56),
        (512, 256, 3, 1, 28),
        (512, 512, 3, 1, 14),
    ],
}
# output features, input features, tokens
LINEARS = {
    "bert": [
        (768, 768, 1),
        (768, 768, 128),
        (3072, 768, 32),
        (3072, 768, 128),
        (768, 3072, 32),
        (768, 3072, 128),
    ],
    "minilm": [(384, 384, 1), (384, 384, 128), (1536, 384, 32), (1536, 384, 128), (384, 1536, 128)],
}


def layers() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The 40 layers by name, with weights of decaying spectra and something to read."""
    generator = torch.Generator().manual_seed(0)
    for family, convs in CONVS.items():
        for o, i, k, stride, size in convs:
            conv = nn.Conv2d(i, o, k, stride, k // 2)
            conv.weight = nn.Parameter(decaying(conv.weight.shape, generator))
            yield (
                f"{family} {o}x{i}x{k}x{k}{'/2' if stride == 2 else ''}@{size}",
                nn.Sequential(conv),
                torch.randn(1, i, size, size, generator=generator),
            )
    for family, linears in LINEARS.items():
        for o, i, tokens in linears:
            linear = nn.Linear(i, o)
            linear.weight = nn.Parameter(decaying(linear.weight.shape, generator))
            yield (
                f"{family} {o}x{i}@{tokens}",
                nn.Sequential(linear),
                torch.randn(1, tokens, i, generator=generator),
            )


def opened(module: nn.Module, x: Tensor, frontend: str) -> object:
    """The layer as a model of that front end."""
    return module if frontend == "torch" else exported(module, x, open_batch=True)


def run_layer(
    name: str, module: nn.Module, x: Tensor, runtime: str, threads: int, cache: Path
) -> dict[str, str | float | int]:
    """Plan one layer and measure what was chosen against the dense layer again."""
    frontend = _FRONTENDS[runtime]
    text = {"eager": "cpu", "onnxruntime": "cpu"}.get(runtime, f"cpu:{runtime}")
    model = opened(module, x, frontend)
    artifact, budget = None, math.nan
    for budget in _BUDGETS:
        try:
            artifact = tdpass.make_plan(
                model, {"macs": budget}, example_inputs=x, target=text, threads=threads, cache=cache
            )
        except tdpass.BudgetError:
            continue
        break
    head = {
        "layer": name,
        "runtime": runtime,
        "threads": threads,
        "batch": 1,
        "goal": f"measured_ratio < {GOAL}",
    }
    if artifact is None:
        return {**head, "format": "dense", "predicted_ratio": 1.0, "measured_ratio": 1.0, "met": "true"}
    (choice,), (site,) = artifact.plan.choices, artifact.opened.sites()
    dense, chosen = open_target(text, frontend).time(
        site, [DENSE, choice.form], Setting(1, threads), careful=True
    )
    ratio = chosen.seconds / dense.seconds
    return {
        **head,
        "budget": budget,
        "format": choice.format,
        "rank": "x".join(map(str, choice.rank)),
        "dense_us": dense.seconds * 1e6,
        "chosen_us": chosen.seconds * 1e6,
        "predicted_ratio": choice.seconds / choice.dense_seconds,
        "measured_ratio": ratio,
        "met": str(ratio < GOAL).lower(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--layers", nargs="+", default=[""], help="only layers whose names contain one of these"
    )
    parser.add_argument("--runtimes", nargs="+", default=list(_FRONTENDS), choices=list(_FRONTENDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="targets.csv", help="file under results/, or a path")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(options.output, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        for name, module, x in layers():
            if any(part in name for part in options.layers):
                for runtime in options.runtimes:
                    table.add(**run_layer(name, module.eval(), x, runtime, options.threads, Path(folder)))
                    print(show(table.rows[-1:], COLUMNS), flush=True)
    ratios = [float(row["measured_ratio"] or 0) for row in table.rows]
    print(
        f"\n{show(table.rows, COLUMNS)}\n\nslowest choice: {max(ratios, default=0):.3f} of dense, goal: "
        f"below {GOAL}"
    )


if __name__ == "__main__":
    main()
