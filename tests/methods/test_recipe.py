"""Recipes: those that come with tdpass are sound, wrong ones are refused, the command line runs and resumes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tdpass.cli import main
from tdpass.errors import UsageError
from tdpass.methods.recipe import Recipe, named, names
from tdpass.training.batches import Batches

HERE = "tests.methods.test_recipe"


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def data(seed: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 4
    return Batches(torch.randn(128, 4, 4, generator=generator) + labels[:, None, None], labels, 16, seed)


def score(model: nn.Module) -> float:
    held = data(0)
    return 100 * float((model(held.inputs).argmax(1) == held.targets).float().mean())


def recipe(**changes: object) -> dict[str, object]:
    method = {"admm-tt": {"budget": {"params": 0.6}, "format": "svd", "rounds": 2, "rho": 0.1}}
    own = {"model": f"{HERE}:network", "data": f"{HERE}:data", "test": f"{HERE}:score", "method": method, "settings": {"lr": 0.1}}
    return {**own, "pretrain": 3, "finetune": 1, "example": [2, 4, 4], **changes}


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_are_sound(name: str) -> None:
    found = Recipe.load(name)
    assert found.about
    for text in (found.model, found.data, found.test, found.evaluate, found.calibration):
        assert text is None or callable(named(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None, "nonsense": 1}, "unknown key 'nonsense'"),
        ({"finetune": "two"}, "finetune is 'two'"),
        ({"method": {"admm-xx": {}}}, "unknown training method 'admm-xx'"),
        ({"method": {"admm-tt": {"rank": 3}}}, "unexpected keyword argument 'rank'"),
    ],
)
def test_wrong_recipes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.parse(recipe(**change))


def test_options_change_a_recipe() -> None:
    found = Recipe.parse(recipe()).with_options(["finetune=2", "method.admm-tt.rounds=3", "settings.lr=0.5"])
    assert found.finetune == 2
    assert found.method["admm-tt"]["rounds"] == 3
    assert found.settings["lr"] == 0.5
    for wrong in ("finetune", "method.nothing.rounds=3", "methods=1"):
        with pytest.raises(UsageError):
            Recipe.parse(recipe()).with_options([wrong])


def test_a_run_makes_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    Recipe.parse(recipe(pretrain=0, finetune=0)).run(folder)
    assert {path.name for path in folder.iterdir()} >= {"recipe.json", "run.json", "log.csv"}


def test_the_command_line_trains_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe()))
    assert main(["train", str(path), "--folder", str(folder), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["report"]
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "plan.json", "report.json", "report.html", "log.csv"}
    assert first["checks"]["score_final"] > 50
    assert main(["train", str(path), "--folder", str(folder)]) == 2
    assert "give --resume" in capsys.readouterr().err
    assert main(["train", str(path), "--folder", str(folder), "--json", "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)["report"]
    assert again["checks"] == first["checks"]
    assert again["training"] == first["training"]
    assert main(["train", "nothing.yaml", "--folder", str(folder)]) == 2
    assert "lenet5_admm_nn" in capsys.readouterr().err
