"""A run killed at any moment goes on as if it had not been; a damaged checkpoint is passed over by name."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_run
from selection import mostly_slow
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset

import tdpass
from tdpass.errors import TrainingError
from tdpass.training.checkpoint import newest_checkpoint, save_checkpoint

WORKER = Path(training_run.__file__)
ROOT = WORKER.parents[2]


def start(folder: Path, method: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(WORKER), str(folder), method, "none"], env=environment)


def kill_after(process: subprocess.Popen[bytes], folder: Path, checkpoints: set[str]) -> set[str]:
    """Kill it once it has written a checkpoint that was not there before."""
    while process.poll() is None:
        found = {str(path.relative_to(folder)) for path in folder.glob("*/step-*")}
        if found - checkpoints:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return found
        time.sleep(0.002)
    pytest.fail(f"the worker ended by itself, with {process.returncode}")


def test_killed_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    method = "admm-nn"  # of all methods the one with the most phases
    straight = training_run.train(tmp_path / "straight", method, every=3).model.state_dict()
    folder, seen = tmp_path / "killed", set()
    for _ in range(2):
        seen = kill_after(start(folder, method), folder, seen)
    assert start(folder, method).wait(timeout=120) == 0
    resumed = torch.load(folder / "final-0.pt", weights_only=True)
    assert resumed.keys() == straight.keys()
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(
    ("method", "compiled"),
    [
        *mostly_slow(
            [(method, False) for method in training_run.METHODS],
            [(method, False) for method in ("batude", "haloc", "admm-nn", "svd-training")],
        ),
        pytest.param("admm-tt", True, marks=pytest.mark.slow),
    ],
)
def test_resume_inside_an_epoch(
    method: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdpass.training.loop import Loop

    straight = training_run.train(
        tmp_path / "straight", method, every=3, compiled=compiled
    ).model.state_dict()
    steps, step = iter(range(10**6)), Loop._step

    def stopping(self: Loop, *arguments: object) -> torch.Tensor:
        if next(steps) == 21:  # inside the method's second epoch, past a checkpoint
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Loop, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        training_run.train(tmp_path / "stopped", method, every=3, compiled=compiled)
    monkeypatch.undo()
    resumed = training_run.train(
        tmp_path / "stopped", method, resume=True, every=3, compiled=compiled
    ).model.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Examples with noise that is drawn as they are read: from a generator of its own, or a global one."""

    def __init__(self, source: str) -> None:
        numbers = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(12, 6, generator=numbers), torch.arange(12) % 3
        self.source, self.randomness = source, torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = {
            "none": lambda: 0.0,
            "torch": lambda: float(torch.randn(())),
            "numpy": lambda: float(np.random.standard_normal()),  # noqa: NPY002
            "python": random.random,
            "held": lambda: float(torch.randn((), generator=self.randomness)),
        }[self.source]()
        return self.x[index] + noise, self.y[index]


class Ordered(Sampler[int]):
    """An order of its own in every epoch, from a generator that has a name of its own."""

    def __init__(self) -> None:
        self.randomness = torch.Generator().manual_seed(6)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(12, generator=self.randomness).tolist())

    def __len__(self) -> int:
        return 12


def own() -> torch.Generator:
    return torch.Generator().manual_seed(4)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "torch": lambda: DataLoader(Noisy("none"), 4, shuffle=True),
    "own": lambda: DataLoader(Noisy("none"), 4, shuffle=True, generator=own()),
    "own sampler": lambda: DataLoader(Noisy("none"), 4, sampler=Ordered()),
    "own batches": lambda: DataLoader(
        Noisy("none"), batch_sampler=BatchSampler(Ordered(), 4, drop_last=False)
    ),
    "noise of torch": lambda: DataLoader(Noisy("torch"), 4, shuffle=True, generator=own()),
    "noise of numpy": lambda: DataLoader(Noisy("numpy"), 4, shuffle=True),
    "noise of python": lambda: DataLoader(Noisy("python"), 4, shuffle=True),
    "noise of its own": lambda: DataLoader(Noisy("held"), 4, shuffle=True),
}


def loaded(folder: Path, draws: str, resume: bool = False, stop: int = -1, every: int = 0) -> dict[str, Any]:
    """Three batches in each of four epochs, with dropout between them."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def seen(what: str, done: int, of: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    options = {"pretrain": 4, "control": False, "checkpoint_every": every, "settings": {"lr": 0.1}}
    made = tdpass.train(net, LOADERS[draws](), folder=folder, resume=resume, progress=seen, **options)
    assert isinstance(made.model, nn.Module)
    return made.model.state_dict()


@pytest.mark.parametrize(
    ("draws", "every", "stop"),
    [*product(("torch", "own"), (0, 1, 2), range(1, 12)), *product(list(LOADERS)[2:], (0, 2), (5, 6))],
)
def test_a_data_loader_and_dropout_go_on_as_they_were(
    draws: str, every: int, stop: int, tmp_path: Path
) -> None:
    """Stopped before any one batch, also at the beginning of an epoch."""
    straight = loaded(tmp_path / "straight", draws)
    with pytest.raises(KeyboardInterrupt):
        loaded(tmp_path / "stopped", draws, stop=stop, every=every)
    resumed = loaded(tmp_path / "stopped", draws, resume=True, every=every)
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_data_with_other_generators_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        loaded(tmp_path, "torch", stop=7)
    with pytest.raises(TrainingError, match=r"draws from 2 generators of its own, .* from 1; resume with"):
        loaded(tmp_path, "own", resume=True)


@pytest.mark.parametrize("where", ["sampler", "batch_sampler", "dataset"])
def test_all_that_an_epoch_depends_on_is_told_its_number(where: str) -> None:
    class Told(Sampler[int]):
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

        def __len__(self) -> int:
            return 4

    class Rows(TensorDataset):
        set_epoch = Told.set_epoch
        epochs: list[int]

    told, rows = Told(), Rows(torch.randn(4, 6), torch.arange(4) % 3)
    rows.epochs = []
    data = {
        "sampler": lambda: DataLoader(rows, 2, sampler=told),
        "batch_sampler": lambda: DataLoader(rows, batch_sampler=BatchSampler(told, 2, drop_last=False)),
        "dataset": lambda: DataLoader(rows, 2),
    }[where]()
    tdpass.train(nn.Linear(6, 3), data, pretrain=3, control=False, progress=False)
    assert (rows if where == "dataset" else told).epochs == [0, 1, 2]


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
def test_damaged_checkpoint_is_passed_over_by_name(damage: str, tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 1, {"w": torch.arange(5.0)}, {"steps": 1})
    second = save_checkpoint(tmp_path, 2, {"w": torch.arange(5.0)}, {"steps": 2})
    assert newest_checkpoint(tmp_path) == (second, [])
    victim = next(second.glob("*.safetensors"))
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: 0 if damage == "empty" else -7])
    path, complaints = newest_checkpoint(tmp_path)
    assert path == first
    assert len(complaints) == 1
    assert second.name in complaints[0]
    (first / "manifest.json").unlink()
    with pytest.raises(TrainingError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    from tdpass.training.checkpoint import load_checkpoint

    path = save_checkpoint(tmp_path, 1, {"w": torch.arange(5.0)}, {})
    with pytest.raises(TrainingError, match="'w' of shape"):
        load_checkpoint(path, {"w": torch.zeros(6)})


def test_only_whole_checkpoints_are_seen(tmp_path: Path) -> None:
    for step in range(4):
        save_checkpoint(tmp_path, step, {"w": torch.zeros(2)}, {})
    (tmp_path / ".step-000000009.part").mkdir()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000000002", "step-000000003"]
    path, _ = newest_checkpoint(tmp_path)
    assert path is not None
    assert path.name == "step-000000003"
