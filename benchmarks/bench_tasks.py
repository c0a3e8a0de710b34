"""What tasks lose: a detector, a classifier with Softmax, two outputs and a tagger, trained on digits.

    python -m benchmarks.bench_tasks                       # torch and ONNX, 0.6 and 0.4 of the multiply-adds
    python -m benchmarks.bench_tasks --weights FOLDER      # keeps the trained networks there, to try again on
    the same

256 unlabelled calibration samples of the training split; the score is each task's own on 1,000 samples of
digits that training never saw.  Rows go to results/tasks.csv; `measure` is what the plan was made by.  Needs
scikit-learn (extra `bench`).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import tdpass
from benchmarks.digits import TASKS, Task
from benchmarks.results import Table, Value, show, skip

COLUMNS = (
    "task",
    "frontend",
    "effort",
    "budget_asked",
    "macs_fraction",
    "score_dense",
    "score",
    "points_lost",
    "measure",
    "seconds",
)
_CALIBRATION, _HELD_OUT = 256, 1000


def trained(task: Task, folder: Path | None) -> nn.Module:
    """The network, from the folder where it was trained before."""
    path = None if folder is None else folder / f"{task.name}.pt"
    if path is not None and path.exists():
        network = task.network()
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    network = task.train()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    return network


def as_onnx(network: nn.Module, x: Tensor) -> onnx.ModelProto:
    """The network as an ONNX graph with a free number of samples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (x,),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
        )
    assert program is not None
    return program.model_proto


def runner(model: object) -> Callable[[Tensor], object]:
    """How a model is run on images."""
    if isinstance(model, nn.Module):
        return model
    assert isinstance(model, onnx.ModelProto)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> object:
        outputs = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(x.numpy())})
        tensors = tuple(torch.from_numpy(np.asarray(output)) for output in outputs)
        return tensors if len(tensors) > 1 else tensors[0]

    return run


def row(task: Task, frontend: str, budget: float, effort: str, network: nn.Module) -> dict[str, Value]:
    """One network at one budget through one front end."""
    calibration, _ = task.make(_CALIBRATION, 2, True)
    images, targets = task.make(_HELD_OUT, 1, False)
    model = network if frontend == "torch" else as_onnx(network, calibration[:4])
    start = time.perf_counter()
    artifact = tdpass.compress(model, {"macs": budget}, calibration, cache=False, effort=effort)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        dense, score = (task.score(runner(each)(images), targets) for each in (model, artifact.model))
    reached = artifact.report.final.macs / artifact.report.original.macs
    measured: dict[str, Value] = {
        "score_dense": dense,
        "score": score,
        "points_lost": dense - score,
        "measure": artifact.report.divergence,
    }
    return {
        "task": task.name,
        "frontend": frontend,
        "effort": effort,
        "budget_asked": budget,
        "macs_fraction": reached,
        **measured,
        "seconds": seconds,
    }


def main() -> None:
    """Every task, front end and budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[task.name for task in TASKS],
        choices=[task.name for task in TASKS],
        metavar="NAME",
    )
    parser.add_argument("--frontends", nargs="+", default=["torch", "onnx"], choices=["torch", "onnx"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.6, 0.4])
    parser.add_argument("--effort", default="normal", choices=["fast", "normal", "thorough"])
    parser.add_argument("--weights", type=Path, help="folder for the trained networks")
    parser.add_argument("--out", help="write here instead of results/tasks.csv")
    options = parser.parse_args()
    try:
        import sklearn  # noqa: F401
    except ImportError:
        skip("scikit-learn is not installed; pip install 'tdpass[bench]'")
    table = Table(options.out or "tasks.csv", COLUMNS)
    for task in TASKS:
        network = trained(task, options.weights) if task.name in options.tasks else None
        for frontend in options.frontends if network is not None else ():
            for budget in options.budgets:
                measured = row(task, frontend, budget, options.effort, network)
                table.add(**measured)
                print(show([measured], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
