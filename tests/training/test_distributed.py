"""Two processes train as one does, with replicated and with sharded weights.

They go on from each other's checkpoints.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_run
from torch import Tensor

RUN = Path(training_run.__file__)


def together(folder: Path, method: str, parallel: str) -> list[dict[str, Tensor]]:
    """The final weights of both processes."""
    folder.mkdir(exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    workers = []
    for rank in range(2):
        group = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        environment = {**os.environ, **group, "PYTHONPATH": str(RUN.parents[2]), "OMP_NUM_THREADS": "1"}
        workers.append(
            subprocess.Popen([sys.executable, str(RUN), str(folder), method, parallel], env=environment)
        )
    assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    return [torch.load(folder / f"final-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parallel"),
    [
        ("admm-tt", "ddp"),
        ("admm-nn", "fsdp2"),
        ("batude", "fsdp2"),
        ("searches", "fsdp2"),
        ("surgery", "fsdp2"),
        ("surgery", "ddp"),
        ("lc", "ddp"),
        ("svd-training", "fsdp2"),
        ("cascaded-projection", "ddp"),
    ],
)
def test_two_processes_train_as_one(method: str, parallel: str, tmp_path: Path) -> None:
    alone = training_run.train(tmp_path / "alone", method).model.state_dict()
    first, second = together(tmp_path / "together", method, parallel)
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["batude", "haloc"])
def test_replicated_and_sharded_training_agree(method: str, tmp_path: Path) -> None:
    replicated, _ = together(tmp_path / "ddp", method, "ddp")
    sharded, again = together(tmp_path / "fsdp2", method, "fsdp2")
    assert all(torch.equal(sharded[name], again[name]) for name in again)
    for name, value in replicated.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-5)
