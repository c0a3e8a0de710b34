"""Seconds of a training step, distillation included: eager, compiled, and with factored layers rebuilt.

    TDPASS_DATA=... python -m benchmarks.bench_training_speed

ResNet-20 on batches of 128 in bfloat16, dense and at a third of its parameters.  The ways to train take turns
step by step, in one process and on the same batches; each is given as the median of its ratio to eager
training of the same network.  Rows go to results/training_speed.csv.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import tdpass
from benchmarks import cifar
from benchmarks.results import Table, show
from tdpass.layers.factorized import rebuild_while_training
from tdpass.training.compiled import forward_of
from tdpass.training.distillation import Distillation

COLUMNS = ("model", "layers", "compile", "rebuild", "step_ms", "over_eager")
WAYS = ((False, False), (False, True), (True, False), (True, True))
WARM_UP = 4
Step = Callable[[Tensor], None]


def networks() -> dict[str, nn.Module]:
    """ResNet-20 by the format of its layers."""
    dense = cifar.resnet20()
    found: dict[str, nn.Module] = {"dense": dense}
    for name in ("tucker2", "cp"):
        made = tdpass.compress(
            dense,
            {"params": 0.3333},
            pipeline="plan,factorize",
            formats=(name,),
            example_inputs=torch.zeros(2, 3, 32, 32),
        ).model
        assert isinstance(made, nn.Module)
        found[name] = made
    return found


def step_of(network: nn.Module, compiled: bool, rebuilt: bool) -> Step:
    """One way to train a copy."""
    model = copy.deepcopy(network).train()
    if rebuilt:
        rebuild_while_training(model)
    forward, teacher = forward_of(model, compiled), Distillation(cifar.resnet20(), 1.0, compiled=compiled)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(inputs: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = teacher.loss(inputs, forward(inputs))
        assert loss is not None
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Step, inputs: Tensor) -> float:
    """Of one step."""
    start = time.perf_counter()
    step(inputs)
    return time.perf_counter() - start


def measure(layers: str, network: nn.Module, inputs: list[Tensor], steps: int) -> list[dict[str, Any]]:
    """All ways to train one network, in turn."""
    ways = [way for way in WAYS if layers != "dense" or not way[1]]
    made = {way: step_of(network, *way) for way in ways}
    rounds = [
        {way: seconds(step, inputs[index % len(inputs)]) for way, step in made.items()}
        for index in range(steps + WARM_UP)
    ][WARM_UP:]
    eager = WAYS[0]
    return [
        {
            "model": "resnet20",
            "layers": layers,
            "compile": compiled,
            "rebuild": rebuilt,
            "step_ms": 1e3 * statistics.median(times[compiled, rebuilt] for times in rounds),
            "over_eager": statistics.median(times[eager] / times[compiled, rebuilt] for times in rounds),
        }
        for compiled, rebuilt in ways
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", default="training_speed.csv", help="CSV file (default: results/training_speed.csv)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(options.out, COLUMNS)
    inputs = [batch for batch, _ in islice(cifar.training(), 4)]
    for layers, network in networks().items():
        for row in measure(layers, network, inputs, options.steps):
            table.add(**row)
            print(show([row], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
