"""What ADMM adds to training: seconds of a step and of an epoch, and memory, with and without it.

    TDPASS_DATA=... python -m benchmarks.bench_training_cost

Plain steps and steps under ADMM run in turn, in one process, on the same batches; the median of their ratio
says what a step costs more, and the projections of all layers in its rounds (the median of five over the
phase) are added to each epoch.  Rows go to results/training_cost.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import cifar
from benchmarks.results import Table, show
from tdpass.datasets import open_dataset
from tdpass.methods import make_method
from tdpass.training.batches import Batches
from tdpass.training.loop import cross_entropy
from tdpass.zoo import lenet5

COLUMNS = (
    "model",
    "method",
    "step_plain_ms",
    "step_admm_ms",
    "step_ratio",
    "projection_s",
    "rounds_per_epoch",
    "steps_per_epoch",
    "epoch_plain_s",
    "epoch_admm_s",
    "epoch_ratio",
    "extra_mib",
)
MOVED = 0.02
PROGRESS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the phase: what a round projects on changes over it


@dataclass(frozen=True)
class Case:
    """A network, its data, a method, and how many rounds its recipe has in an epoch."""

    model: Callable[[], nn.Module]
    data: Callable[[], Batches]
    example: tuple[int, ...]
    method: dict[str, Any]
    rounds: int
    calibration: Callable[[], torch.Tensor] | None = None


def mnist() -> Batches:
    """Shuffled batches of 128 training images of MNIST."""
    return open_dataset("mnist").batches()


CASES = {
    "lenet5": Case(lenet5, mnist, (2, 1, 28, 28), {"admm-nn": {"keep": 4500, "rho": 1e-3}}, 48),
    "lenet5_surgery": Case(
        lenet5,
        mnist,
        (2, 1, 28, 28),
        {"admm-nn": {"keep": 4500, "rho": 1e-3, "metric": "fisher", "pruning": "surgery"}},
        48,
    ),
    "resnet20": Case(
        cifar.resnet20,
        cifar.training,
        (2, 3, 32, 32),
        {"admm-tt": {"budget": {"macs": 0.5}, "format": "tucker2"}},
        8,
    ),
    "resnet20_planned": Case(
        cifar.resnet20,
        cifar.training,
        (2, 3, 32, 32),
        {"admm-tt": {"start": {"params": 0.2}}},
        24,
        cifar.calibration,
    ),
    "resnet32": Case(
        cifar.resnet32, cifar.training, (2, 3, 32, 32), {"batude": {"budget": {"macs": 0.5}}}, 8
    ),
}


def measure(name: str, steps: int) -> dict[str, Any]:
    """One model with one method."""
    case = CASES[name]
    model, data = case.model().train(), case.data()
    method = make_method(case.method)
    model = method.prepare(
        model, torch.zeros(case.example), None if case.calibration is None else case.calibration()
    )
    term = method.bind(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    batches = [batch for batch, _ in zip(data, range(8), strict=False)]
    term.begin_round(0.0)
    torch.manual_seed(0)
    rounds = []
    for progress in PROGRESS:
        with torch.no_grad():  # searches take longer for weights that have moved, as they do between rounds
            for weight in method.weights.values():
                weight.add_(torch.randn_like(weight), alpha=MOVED * float(weight.square().mean().sqrt()))
        start = time.perf_counter()
        for inner in term.terms:
            inner.begin_round(progress)
        rounds.append(time.perf_counter() - start)
    projection = statistics.median(rounds)

    def step(index: int, admm: bool) -> float:
        inputs, targets = batches[index % len(batches)]
        start = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy()(model(inputs), targets).backward()
        if admm:
            term.before_step(optimizer)
        optimizer.step()
        if admm:
            with torch.no_grad():
                term.after_step(optimizer)
        return time.perf_counter() - start

    plain, under = [], []
    for index in range(steps + 3):
        first = index % 2 == 0
        times = {admm: step(index, admm) for admm in (first, not first)}
        if index >= 3:
            plain.append(times[False])
            under.append(times[True])
    ratio = statistics.median(a / p for a, p in zip(under, plain, strict=True))
    step_plain, count = statistics.median(plain), len(data)
    epoch_plain, epoch_admm = step_plain * count, step_plain * ratio * count + case.rounds * projection
    held = sum(
        value.numel() * value.element_size()
        for value in term.state().values()
        if isinstance(value, torch.Tensor)
    )
    return {
        "model": name,
        "method": next(iter(case.method)),
        "step_plain_ms": 1e3 * step_plain,
        "step_admm_ms": 1e3 * step_plain * ratio,
        "step_ratio": ratio,
        "projection_s": projection,
        "rounds_per_epoch": case.rounds,
        "steps_per_epoch": count,
        "epoch_plain_s": epoch_plain,
        "epoch_admm_s": epoch_admm,
        "epoch_ratio": epoch_admm / epoch_plain,
        "extra_mib": held / 2**20,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", default="training_cost.csv", help="CSV file (default: results/training_cost.csv)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(options.out, COLUMNS)
    for name in options.models:
        table.add(**measure(name, options.steps))
        print(show([table.rows[-1]], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
