"""Tasks learned one after another by a few columns each: accuracy, forgetting, and added memory.

    python -m benchmarks.bench_incremental permuted               # MNIST, its pixels in a new order for each
    python -m benchmarks.bench_incremental rotated                # MNIST, turned by 9 degrees more for each
    python -m benchmarks.bench_incremental classes --epochs 6     # CIFAR-100, 5 classes each, convolutions
    python -m benchmarks.bench_incremental permuted --folder run  # tasks kept there; the same again goes on
    python -m benchmarks.bench_incremental permuted --lr 1e-2 --split tuning --tasks 4  # to choose a rate

Every task is tested on a whole split with its own network: `test`, or `tuning`, whose images are not trained
on then.  `forgotten` is the largest difference, over all tasks so far, between what their networks answer to
256 of these images and what they answered when they were learned.  `added` is what the task adds in bytes, of
which `own` are its biases, norms and head; `dense` is a network of its own.  `seconds` are wall time, and
`processor_seconds` what the training took of one processor.  Rows go to results/incremental.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import Table, show
from tdpass.datasets import Dataset, open_dataset
from tdpass.datasets.base import Examples
from tdpass.methods import IncrementalTasks
from tdpass.methods.kept_tasks import Ranks
from tdpass.training.batches import Batches

COLUMNS = (
    "case",
    "split",
    "first_rank",
    "step_rank",
    "ranks",
    "epochs",
    "lr",
    "seed",
    "task",
    "accuracy",
    "mean",
    "forgotten",
    "added",
    "columns",
    "selectors",
    "own",
    "dense",
    "seconds",
    "processor_seconds",
)
TASKS = 20
WATCHED = 256


@dataclass(frozen=True)
class Case:
    """A data set cut into tasks, the network that learns them, and how."""

    data: str
    network: Callable[[], nn.Module]
    part: Callable[[Dataset, Examples, int], Examples]
    first_rank: int
    step_rank: int
    epochs: int
    batch: int
    lr: float


def perceptron() -> nn.Module:
    """784-256-256-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def convolutions() -> nn.Module:
    """Four 3x3 convolutions with batch-norm, and a head of five classes."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5))


def permuted(dataset: Dataset, examples: Examples, task: int) -> Examples:
    """Pixels in an order of the task's own; the first task's is as it is."""
    order = torch.randperm(784, generator=torch.Generator().manual_seed(task)) if task else torch.arange(784)
    return Examples(examples.inputs.flatten(1)[:, order].view_as(examples.inputs), examples.targets)


def rotated(dataset: Dataset, examples: Examples, task: int) -> Examples:
    """Images turned by 9 degrees a task."""
    angle = torch.tensor(torch.pi * 9 * task / 180)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    grid = F.affine_grid(
        F.pad(turn, (0, 1)).unsqueeze(0), [1, *examples.inputs.shape[1:]], align_corners=False
    )
    grid = grid.expand(4096, -1, -1, -1)
    turned = [
        F.grid_sample(images.float(), grid[: len(images)], align_corners=False)
        for images in torch.split(examples.inputs, 4096)
    ]
    return Examples(torch.cat(turned).round().to(torch.uint8), examples.targets)


def classes(dataset: Dataset, examples: Examples, task: int) -> Examples:
    """The images of five classes."""
    chosen = examples.targets // 5 == task
    return Examples(examples.inputs[chosen], examples.targets[chosen] - 5 * task)


CASES = {
    "permuted": Case("mnist", perceptron, permuted, 11, 1, 24, 256, 1e-2),
    "rotated": Case("mnist", perceptron, rotated, 11, 1, 4, 256, 4e-3),
    "classes": Case("cifar100", convolutions, classes, 16, 4, 20, 128, 4e-3),
}


def answers(network: nn.Module, dataset: Dataset, examples: Examples) -> Tensor:
    """Class scores of all examples."""
    with torch.inference_mode():
        return torch.cat([network(dataset.prepared(chunk)) for chunk in torch.split(examples.inputs, 500)])


def accuracy(network: nn.Module, dataset: Dataset, examples: Examples) -> float:
    """Percentage of examples that get the right class."""
    right = answers(network, dataset, examples).argmax(1) == examples.targets
    return 100 * float(right.double().mean())


def learn(
    tasks: IncrementalTasks,
    case: Case,
    dataset: Dataset,
    parts: Sequence[Examples],
    options: argparse.Namespace,
) -> None:
    """Train one more task, on its share of the given examples."""
    whole = Examples(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))
    chosen = case.part(dataset, whole, len(tasks))
    data = Batches(
        chosen.inputs,
        chosen.targets,
        case.batch,
        options.seed,
        lambda inputs, generator: dataset.prepared(inputs),
    )
    settings = {"optimizer": "adam", "lr": options.lr}
    tasks.add_task(data, options.epochs, settings=settings, seed=options.seed + len(tasks))


def begun(case: Case, model: nn.Module, ranks: Ranks, path: Path | None) -> IncrementalTasks:
    """The tasks in the file, or none."""
    if path is not None and path.exists():
        return IncrementalTasks.load(path, model)
    return IncrementalTasks(model, case.first_rank, case.step_rank, ranks=ranks, path=path)


def parsed() -> argparse.Namespace:
    """What was asked, with the case's own epochs and rate where nothing else was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--ranks", choices=("equal", "fisher"), default="equal")
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    case = CASES[options.case]
    options.epochs = options.epochs or case.epochs
    options.lr = options.lr or case.lr
    return options


def main() -> None:
    """Learn the tasks of a case one after another."""
    options = parsed()
    case = CASES[options.case]
    dataset = open_dataset(case.data)
    judged = getattr(dataset, options.split)
    parts = [dataset.training] if options.split == "tuning" else [dataset.training, dataset.tuning]
    table = Table("incremental.csv", COLUMNS)
    torch.manual_seed(options.seed)
    model = case.network()
    path = None
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        path = options.folder / f"{options.case}.safetensors"
    tasks = begun(case, model, options.ranks, path)
    asked = {name: getattr(options, name) for name in ("case", "split", "ranks", "epochs", "lr", "seed")}
    seen: list[tuple[Examples, Tensor]] = []
    scores: list[float] = []
    for task in range(options.tasks):
        start, processor = time.perf_counter(), time.process_time()
        if task == len(tasks):
            learn(tasks, case, dataset, parts, options)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        tested = case.part(dataset, judged, task)
        scores.append(accuracy(tasks.use_task(task), dataset, tested))
        watched = Examples(tested.inputs[:WATCHED], tested.targets[:WATCHED])
        seen.append((watched, answers(tasks.use_task(task), dataset, watched)))
        moved = [
            answers(tasks.use_task(k), dataset, images) - before for k, (images, before) in enumerate(seen)
        ]
        memory = tasks.memory(task)
        table.add(
            **asked,
            first_rank=case.first_rank,
            step_rank=case.step_rank,
            task=task + 1,
            accuracy=scores[-1],
            mean=sum(scores) / len(scores),
            forgotten=max(float(each.abs().max()) for each in moved),
            added=sum(memory.values()),
            dense=sum(parameter.nbytes for parameter in model.parameters()),
            seconds=seconds,
            processor_seconds=processor,
            **memory,
        )
    print(show(table.rows, ("task", "accuracy", "mean", "forgotten", "added", "seconds")))


if __name__ == "__main__":
    main()
