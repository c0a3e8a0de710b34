"""Other tools on the same networks and calibration images.

Uniform Tucker-2 and spatial SVD, BALF, AIMET, and torch-pruning.

    TDPASS_DATA=... python -m benchmarks.peers  # all of them on all networks, to results/peers_accuracy.csv
    TDPASS_DATA=... python -m benchmarks.peers --networks resnet20 --methods tucker2 --budgets 0.5
    TDPASS_DATA=... python -m benchmarks.peers --methods balf --resume  # what of it has no row yet

Needs the extra `bench`.  None of these methods is fine-tuned, and all but AIMET and the Taylor criterion,
which use the labels of the calibration images, work without labels.  The first convolution and the classifier
stay dense: that is what these tools advise, and it is better for them.  `accuracy_bn_recalibrated` is after
re-estimating the batch-norm statistics on eight random crops and flips of each calibration image.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar
from benchmarks.finetune import distil
from benchmarks.peers_balf import balf
from benchmarks.results import Table, Value, show

BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4)
COLUMNS = (
    "model",
    "method",
    "budget_asked",
    "macs_fraction",
    "accuracy",
    "accuracy_bn_recalibrated",
    "seconds",
)
Outcome = tuple[float, nn.Module, float]  # budget asked for, compressed model, seconds to make it
Factorize = Callable[[nn.Conv2d, float], nn.Module]


def tucker2(conv: nn.Conv2d, share: float) -> nn.Module:
    """Tucker-2 by tensorly's `partial_tucker`: 1x1, k x k, 1x1.

    Both ranks are the same share of their channels.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker

    ranks = [max(1, round(share * size)) for size in conv.weight.shape[:2]]
    with tensorly.backend_context("numpy"):
        (core, (out, into)), _ = partial_tucker(
            conv.weight.detach().numpy().astype(np.float64),
            rank=ranks,
            modes=[0, 1],
            init="svd",
            random_state=0,
        )
    core, out, into = (torch.from_numpy(np.ascontiguousarray(factor)).float() for factor in (core, out, into))
    return nn.Sequential(
        _conv(into.T[:, :, None, None]),
        _conv(core, conv.stride, conv.padding),
        _conv(out[:, :, None, None], bias=conv.bias),
    )


def spatial_svd(conv: nn.Conv2d, share: float) -> nn.Module:
    """Spatial SVD, k x 1 then 1 x k, by a truncated singular value decomposition.

    The rank is a share of the largest one.
    """
    o, i, h, w = conv.weight.shape
    u, s, v = torch.linalg.svd(
        conv.weight.detach().double().permute(1, 2, 0, 3).reshape(i * h, o * w), full_matrices=False
    )
    rank = max(1, round(share * len(s)))
    root = s[:rank].sqrt()
    first = (u[:, :rank] * root).T.reshape(rank, i, h, 1).float()
    second = (root[:, None] * v[:rank]).reshape(rank, o, 1, w).transpose(0, 1).float()
    (down, across), (top, left) = conv.stride, conv.padding
    return nn.Sequential(_conv(first, (down, 1), (top, 0)), _conv(second, (1, across), (0, left), conv.bias))


def _conv(
    weight: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    bias: Tensor | None = None,
) -> nn.Conv2d:
    o, i, h, w = weight.shape
    conv = nn.Conv2d(i, o, (h, w), tuple(stride), tuple(padding), bias=bias is not None)
    conv.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        conv.bias = bias
    return conv


def uniform(factorize: Factorize, name: str, budgets: Sequence[float]) -> Iterator[Outcome]:
    """The same share of the rank in every layer, the largest that meets each budget.

    Layers that would grow stay dense.
    """
    dense = cifar.load_resnet(name)
    full = cifar.macs(dense)
    for budget in budgets:
        start = time.perf_counter()
        low, high, best = 0.0, 1.0, None
        for _ in range(9):
            share = (low + high) / 2
            model = _replaced(dense, lambda conv, share=share: factorize(conv, share))
            if cifar.macs(model) <= budget * full:
                low, best = share, model
            else:
                high = share
        if best is not None:
            yield budget, best, time.perf_counter() - start


def _replaced(dense: nn.Module, replace: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    model = copy.deepcopy(dense)
    for path, conv in [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and path != "conv1"
    ]:
        layers = replace(conv)
        shape = (1, conv.in_channels, 8, 8)
        if cifar.macs(layers, shape) < cifar.macs(conv, shape):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layers)
    return model


def torch_pruning(criterion: str, name: str, budgets: Sequence[float], steps: int = 100) -> Iterator[Outcome]:
    """Channels by torch-pruning, global ranking by group norm or Taylor importance.

    It prunes in small steps with fresh gradients.

    Only the channels between the two convolutions of a block: its dependency graph follows no zero-padded
    shortcut, and pruning across one leaves layers whose channels do not match.
    """
    import torch_pruning as tp

    model = cifar.load_resnet(name)
    full = cifar.macs(model)
    importance = {
        "norm": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
    }[criterion]()
    kept = [
        module
        for path, module in model.named_modules()
        if path in ("conv1", "linear") or path.endswith("conv2")
    ]
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 32, 32),
        importance,
        global_pruning=True,
        pruning_ratio=0.95,
        iterative_steps=steps,
        ignored_layers=kept,
    )
    inputs, labels = cifar.calibration(), cifar.data().calibration.targets
    start, waiting = time.perf_counter(), sorted(budgets, reverse=True)
    for _ in range(steps):
        model.zero_grad()
        for x, y in zip(inputs.split(128), labels.split(128), strict=True):
            F.cross_entropy(model(x), y, reduction="sum").div(len(labels)).backward()
        pruner.step()
        while waiting and cifar.macs(model) <= waiting[0] * full:
            yield waiting.pop(0), copy.deepcopy(model), time.perf_counter() - start
        if not waiting:
            return


METHODS: Mapping[str, Callable[[str, Sequence[float]], Iterator[Outcome]]] = {
    "tucker2": lambda name, budgets: uniform(tucker2, name, budgets),
    "spatial_svd": lambda name, budgets: uniform(spatial_svd, name, budgets),
    "balf": balf,
    "torch_pruning_norm": lambda name, budgets: torch_pruning("norm", name, budgets),
    "torch_pruning_taylor": lambda name, budgets: torch_pruning("taylor", name, budgets),
}
NAMES = (*METHODS, "aimet_spatial_svd")
_NEEDS = {
    "tucker2": "tensorly",
    "torch_pruning_norm": "torch_pruning",
    "torch_pruning_taylor": "torch_pruning",
    "aimet_spatial_svd": "aimet_torch",
}


def measure(name: str, method: str, outcome: Outcome, finetune: bool = False) -> dict[str, Value]:
    """Accuracy on the test images, and the share of multiply-adds that the network really has.

    Accuracy is of the network as it is and with recalibrated batch-norm.

    With `finetune` also after two epochs of distillation from the dense network.
    """
    budget, model, seconds = outcome
    share = cifar.macs(model) / cifar.macs(cifar.load_resnet(name))
    recalibrated = cifar.evaluate(cifar.recalibrate_batchnorm(model))
    figures: dict[str, Value] = {
        "macs_fraction": share,
        "accuracy": cifar.evaluate(model),
        "accuracy_bn_recalibrated": recalibrated,
        "seconds": seconds,
    }
    if finetune:
        start = time.perf_counter()
        figures["accuracy_finetuned"] = cifar.evaluate(distil(model, cifar.load_resnet(name)))
        figures["seconds_finetuning"] = time.perf_counter() - start
    return {"model": name, "method": method, "budget_asked": budget, **figures}


def run(
    name: str, method: str, budgets: Sequence[float], finetune: bool = False
) -> Iterator[dict[str, Value]]:
    """Measured rows of one method on one network; none, with a message, when its package is missing."""
    package = _NEEDS.get(method)
    if package is not None and importlib.util.find_spec(package) is None:
        print(f"{method}: skipped, {package} is not installed (pip install -c constraints.txt -e .[bench])")
    elif method == "aimet_spatial_svd":
        # AIMET needs stand-ins among the imported modules, which nothing else should see: a process of its
        # own
        command = [
            sys.executable,
            "-m",
            "benchmarks.peers_aimet",
            name,
            *map(str, budgets),
            *(["--finetune"] if finetune else []),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
        if process.returncode:
            print(f"{method}: failed with exit code {process.returncode}")
    else:
        for outcome in METHODS[method](name, budgets):
            yield measure(name, method, outcome, finetune)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", default=list(cifar.DENSE_ACCURACY), choices=list(cifar.DENSE_ACCURACY)
    )
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--resume", action="store_true", help="leave out what the file has a row of")
    options = parser.parse_args()
    table = Table("peers_accuracy.csv", COLUMNS)
    for name in options.networks:
        for method in options.methods:
            budgets = [
                budget
                for budget in options.budgets
                if not (options.resume and table.has(model=name, method=method, budget_asked=budget))
            ]
            for row in run(name, method, budgets) if budgets else ():
                table.add(**row)
                print(show([row], COLUMNS).splitlines()[-1], flush=True)
    print(show(table.rows, COLUMNS))


if __name__ == "__main__":
    main()
