"""TensorBoard and Weights & Biases show epochs as log.csv has them; a failed run ends there as failed."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tdpass
from tdpass.cli import main
from tdpass.errors import UsageError
from tdpass.loggers import LOGGERS, Logger
from tdpass.report import Report, TrainingRow
from tdpass.training.batches import Batches

METHOD = {"admm-tt": {"budget": {"params": 0.7}, "rounds": 2, "rho": 0.1}}


def _run(loggers: Any, folder: Path, **options: Any) -> tdpass.Artifact[nn.Module]:
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    data = Batches(x, (x.sum(1) > 0).long(), 32)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 2))
    return tdpass.train(model, data, METHOD, control=False, folder=folder, loggers=loggers, **options)


def test_tensorboard_has_every_epoch_and_the_result(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    artifact = _run(["tensorboard"], tmp_path, evaluate=lambda model: 50.0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for row in artifact.report.training:
        losses = {event.step: event.value for event in events.Scalars(f"{row.stage}/loss")}
        assert losses[row.epoch] == pytest.approx(row.loss, rel=1e-6)
        assert events.Scalars(f"{row.stage}/score")[-1].value == 50.0
    share = artifact.report.final.params / artifact.report.original.params
    assert events.Scalars("result/params")[0].value == pytest.approx(share, rel=1e-6)


class _Project(types.ModuleType):
    """What the package wandb is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[dict[str, float]] = []
        self.summary: dict[str, float] = {}
        self.code: int | None = None

    def init(self, **settings: Any) -> _Project:
        self.settings = settings
        return self

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


def test_wandb_has_every_epoch_and_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _Project()
    monkeypatch.setitem(sys.modules, "wandb", project)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    artifact = _run(["wandb"], tmp_path / "one")
    assert (project.settings["project"], project.settings["name"]) == ("mine", "one")
    assert project.settings["config"]["method.rounds"] == "2"
    rows = artifact.report.training
    assert [entry[f"{row.stage}/loss"] for entry, row in zip(project.logged, rows, strict=True)] == [
        row.loss for row in rows
    ]
    assert project.summary["result/params"] <= 0.7
    assert project.code == 0


def test_a_run_that_fails_ends_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _Project()
    monkeypatch.setitem(sys.modules, "wandb", project)

    def failing(model: nn.Module) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _run(["wandb"], tmp_path, evaluate=failing)
    assert project.code == 1


@pytest.mark.parametrize("name", LOGGERS.names())
def test_a_library_that_is_not_there_is_named_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"pip install {name}"):
        _run([name], tmp_path)
    assert not (tmp_path / "log.csv").exists()


def test_a_logger_of_ones_own_is_told(tmp_path: Path) -> None:
    class Mine(Logger):
        name = "mine"

        def __init__(self) -> None:
            self.rows: list[TrainingRow] = []

        def start(self, folder: Path, facts: Mapping[str, object]) -> None:
            self.folder = folder

        def row(self, row: TrainingRow) -> None:
            self.rows.append(row)

        def finish(self, report: Report | None) -> None:
            self.report = report

    mine = Mine()
    artifact = _run([mine], tmp_path)
    assert mine.folder == tmp_path
    assert mine.rows == artifact.report.training
    assert mine.report is artifact.report


def test_the_command_line_names_the_loggers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in LOGGERS.names())
