"""Tasks learned by columns: nothing is forgotten, and each is an ordinary low-rank model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.errors import InvalidModelError, TrainingError, UsageError
from tdpass.methods import incremental_tasks
from tdpass.methods.incremental_tasks import IncrementalTasks
from tdpass.training.batches import Batches

QUICK = {"optimizer": "adam", "lr": 1e-2}
IMAGES = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(96) % 3


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    stem = (
        nn.Conv2d(1, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
    )
    return nn.Sequential(*stem, nn.ReLU(), nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 3))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)
    )


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.two, self.out = (
            nn.Linear(64, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.first(x.flatten(1)))))
        return self.out(torch.relu(self.two(x)))


NETS = {"convolutional": convolutional, "linear": linear, "tied": Tied}


def task(number: int) -> Batches:
    """The images with their pixels in another order, and labels that follow one pixel of them."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(number))
    images = IMAGES.flatten(1)[:, order].view_as(IMAGES)
    return Batches(images + LABELS[:, None, None, None], LABELS, 32)


def learned(tasks: IncrementalTasks, count: int) -> IncrementalTasks:
    for number in range(len(tasks), count):
        assert tasks.add_task(task(number), 1, settings=QUICK, seed=number) == number
    return tasks


@pytest.mark.parametrize(("net", "ranks"), [*((net, "equal") for net in NETS), ("convolutional", "fisher")])
def test_twenty_tasks_later_the_first_answers_bit_for_bit_as_it_did(net: str, ranks: Any) -> None:
    tasks = learned(IncrementalTasks(NETS[net](), 3, 1, ranks=ranks), 1)
    before = tasks.use_task(0)(IMAGES)
    kept = {name: value.clone() for name, value in tasks.tasks[0].tensors().items()}
    learned(tasks, 20)
    assert torch.equal(tasks.use_task(0)(IMAGES), before)
    assert all(torch.equal(value, kept[name]) for name, value in tasks.tasks[0].tensors().items())
    assert not torch.equal(tasks.use_task(19)(IMAGES), before)


def test_a_task_is_learned_by_its_new_columns_its_selector_and_what_is_its_own() -> None:
    tasks = IncrementalTasks(convolutional(), 3, 2)
    for number in range(2):
        tasks.add_task(task(0), 30, settings=QUICK, seed=number)
        right = (tasks.use_task(number)(task(0).inputs).argmax(1) == LABELS).float().mean()
        assert right > 0.9
    assert [row.loss for row in tasks.training][-1] < tasks.training[0].loss
    u, v = (torch.cat([getattr(each, part)["6"] for each in tasks.tasks], 1) for part in ("u", "v"))
    torch.testing.assert_close(
        tasks.use_task(1)[6].weight + 0, (u * tasks.tasks[1].s["6"]) @ v.T, rtol=1e-4, atol=1e-5
    )


def test_the_first_task_begins_as_the_best_low_rank_model_of_what_was_given() -> None:
    model = linear()
    tasks = IncrementalTasks(model, 5, 1)
    tasks.add_task(task(0), 1, settings={"optimizer": "sgd", "lr": 1e-12})
    left, values, right = torch.linalg.svd(model[1].weight.detach().double())
    best = (left[:, :5] * values[:5]) @ right[:5]
    torch.testing.assert_close(tasks.use_task(0)[1].weight.double() + 0, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_memory_is_all_that_a_task_adds(net: str) -> None:
    tasks = learned(IncrementalTasks(NETS[net](), 3, 1), 2)
    for number in range(2):
        assert sum(tasks.memory(number).values()) == sum(
            value.nbytes for value in tasks.tasks[number].tensors().values()
        )
    if net == "linear":
        heads = 4 * (20 + 16 + 16 * 3 + 3)
        assert tasks.memory(0) == {"columns": 4 * 3 * (84 + 36), "selectors": 4 * 6, "own": heads}
        assert tasks.memory(1) == {"columns": 4 * (84 + 36), "selectors": 4 * 8, "own": heads}


def test_by_fisher_information_a_task_takes_no_more_numbers_and_puts_them_where_they_help() -> None:
    tasks = learned(IncrementalTasks(linear(), 3, 2, ranks="fisher"), 2)
    columns = {name: tasks.tasks[1].u[name].shape[1] for name in tasks.sites}
    assert 84 * columns["1"] + 36 * columns["3"] <= 2 * (84 + 36)
    assert 84 * columns["1"] + 36 * columns["3"] + 36 > 2 * (84 + 36)


@pytest.mark.parametrize("net", NETS)
def test_a_task_is_an_ordinary_artifact(net: str, tmp_path: Path) -> None:
    tasks = learned(IncrementalTasks(NETS[net](), 3, 1, example_inputs=IMAGES[:2]), 2)
    artifact = tasks.artifact(1)
    assert {choice.rank for choice in artifact.plan} == {(4,)}
    assert {choice.format for choice in artifact.plan} <= {"svd", "channel_svd"}
    assert artifact.report.final.params < artifact.report.original.params
    artifact.save(tmp_path / "model.safetensors")
    answer = artifact.model(IMAGES)
    assert torch.equal(tdpass.load(tmp_path / "model.safetensors", NETS[net]()).eval()(IMAGES), answer)
    torch.onnx.export(artifact.model, (IMAGES,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (run,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(run), answer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("net", NETS)
def test_tasks_are_read_again_and_gone_on_with(net: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.safetensors"
    tasks = learned(IncrementalTasks(NETS[net](), 3, 2, path=path), 2)
    again = IncrementalTasks.load(path, NETS[net]())
    assert len(again) == 2
    assert all(torch.equal(again.use_task(k)(IMAGES), tasks.use_task(k)(IMAGES)) for k in range(2))
    learned(again, 3)
    learned(tasks, 3)
    assert torch.equal(again.use_task(2)(IMAGES), tasks.use_task(2)(IMAGES))


def test_a_task_that_is_killed_leaves_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tasks.safetensors"
    tasks = learned(IncrementalTasks(linear(), 3, 1, path=path), 2)
    content, answer = path.read_bytes(), tasks.use_task(1)(IMAGES)

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    for place in ("train", "write_tasks"):
        with monkeypatch.context() as patch:
            patch.setattr(incremental_tasks, place, killed)
            with pytest.raises(KeyboardInterrupt):
                learned(tasks, 3)
        assert len(tasks) == 2
        assert path.read_bytes() == content
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        assert torch.equal(tasks.use_task(1)(IMAGES), answer)


def test_a_task_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    whole, halves = (learned(IncrementalTasks(linear(), 3, 1), 1) for _ in range(2))
    whole.add_task(task(1), 2, settings=QUICK, seed=1, folder=tmp_path / "whole")

    def stop(row: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halves.add_task(
            task(1), 2, settings=QUICK, seed=1, folder=tmp_path / "halves", checkpoint_every=1, log=stop
        )
    halves.add_task(
        task(1), 2, settings=QUICK, seed=1, folder=tmp_path / "halves", checkpoint_every=1, resume=True
    )
    assert torch.equal(whole.use_task(1)(IMAGES), halves.use_task(1)(IMAGES))


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    for options in ({"first_rank": 0, "step_rank": 1}, {"first_rank": 1, "step_rank": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            IncrementalTasks(linear(), **options)
    with pytest.raises(UsageError, match="leave no site"):
        IncrementalTasks(linear(), 2, 1, include=["nothing"])
    path = tmp_path / "tasks.safetensors"
    tasks = IncrementalTasks(linear(), 2, 1, path=path)
    with pytest.raises(UsageError, match="none yet"):
        tasks.use_task(0)
    learned(tasks, 1)
    for ask in (tasks.use_task, tasks.artifact, tasks.memory):
        with pytest.raises(UsageError, match="0 to 0"):
            ask(1)
    with pytest.raises(UsageError, match="exists"):
        IncrementalTasks(linear(), 2, 1, path=path)
    with pytest.raises(InvalidModelError, match="begun with"):
        IncrementalTasks.load(path, convolutional())
    with pytest.raises(InvalidModelError, match="begun with"):
        IncrementalTasks.load(
            path,
            nn.Sequential(
                nn.Flatten(), nn.Linear(64, 22), nn.ReLU(), nn.Linear(22, 16), nn.ReLU(), nn.Linear(16, 3)
            ),
        )
    with pytest.raises(TrainingError, match="finite"):
        tasks.add_task(task(1), 1, settings={"optimizer": "sgd", "lr": 1e30})
    assert len(tasks) == 1
    path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(InvalidModelError):
        IncrementalTasks.load(path, linear())


def test_a_file_that_cannot_be_written_is_said_before_a_task_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing" / "tasks.safetensors"
    with pytest.raises(UsageError, match=r"cannot write .*missing"):
        IncrementalTasks(linear(), 3, 1, path=missing)
    missing.parent.mkdir()
    tasks = IncrementalTasks(linear(), 3, 1, path=missing)
    missing.parent.rmdir()
    monkeypatch.setattr(incremental_tasks, "train", lambda *arguments, **options: pytest.fail("trained"))
    with pytest.raises(UsageError, match=r"cannot write .*missing"):
        learned(tasks, 1)
