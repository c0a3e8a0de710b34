"""Recipes: those of tdpass are sound, wrong ones are refused, the command line runs and resumes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import tdpass
from tdpass.cli import main
from tdpass.datasets import PARTS, is_dataset, open_dataset
from tdpass.errors import InvalidModelError, UsageError
from tdpass.methods.material import gathered
from tdpass.methods.objects import named
from tdpass.methods.recipe import Recipe, names, starting_recipe
from tdpass.progress import ProgressBars
from tdpass.training.batches import Batches
from tdpass.zoo import NETS

HERE = "tests.methods.test_recipe"


def network(inputs: int = 16, classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, classes))


def data(seed: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 4
    return Batches(torch.randn(128, 4, 4, generator=generator) + labels[:, None, None], labels, 16, seed)


def images() -> list[torch.Tensor]:
    return list(data(0).inputs.split(32))


def score(model: nn.Module) -> float:
    held = data(0)
    return 100 * float((model(held.inputs).argmax(1) == held.targets).float().mean())


def recipe(**changes: object) -> dict[str, object]:
    method = {"admm-tt": {"budget": {"params": 0.6}, "format": "svd", "rounds": 2, "rho": 0.1}}
    own = {
        "model": f"{HERE}:network",
        "data": f"{HERE}:data",
        "test": f"{HERE}:score",
        "method": method,
        "settings": {"lr": 0.1},
    }
    return {**own, "pretrain": 3, "finetune": 1, "example": [2, 4, 4], **changes}


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_are_sound(name: str) -> None:
    found = Recipe.load(name)
    assert found.about
    assert found.model in NETS
    assert is_dataset(found.data)
    assert {found.test, found.evaluate, found.calibration} <= {*PARTS, None}


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_find_what_they_need_in_the_digits(name: str) -> None:
    recipe, said = Recipe.load(name).with_data("digits"), list[str]()
    material = gathered(recipe, said.append)
    inputs, targets = next(iter(material.batches))
    assert inputs.shape[1:] == material.example[1:]
    assert material.model(inputs).shape == (len(targets), 10)
    assert len(material.batches) >= recipe.rounds_per_epoch
    assert (material.pretrain > 0) != ("from random weights" in recipe.about)
    assert bool(said) == recipe.trained
    for text in (recipe.test, recipe.evaluate):
        score = material.score(text)
        assert score is not None
        assert 0 <= score(material.model) < 50
    if recipe.calibration is not None:
        assert material.inputs(recipe.calibration).shape[1:] == inputs.shape[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None, "nonsense": 1}, "unknown key 'nonsense'"),
        ({"finetune": "two"}, "finetune is 'two'"),
        ({"augment": {"turn": 3}}, "unknown key 'turn'"),
        ({"method": {"admm-xx": {}}}, "unknown training method 'admm-xx'"),
        ({"method": {"admm-tt": {"rank": 3}}}, "has no option 'rank' .did you mean 'ranks'"),
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


def test_the_command_line_trains_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe()))
    assert main(["train", str(path), "--folder", str(folder), "--json", "--resume"]) == 0
    said = capsys.readouterr()
    assert f"{folder} holds no checkpoint to go on from; training starts from the beginning" in said.err
    first = json.loads(said.out)["report"]
    assert {path.name for path in folder.iterdir()} >= {
        "model.safetensors",
        "plan.json",
        "report.json",
        "report.html",
        "log.csv",
    }
    assert first["checks"]["score_final"] > 50
    assert main(["train", str(path), "--folder", str(folder)]) == 1
    assert "give --resume" in capsys.readouterr().err
    assert main(["train", str(path), "--folder", str(folder), "--json", "--resume"]) == 0
    said = capsys.readouterr()
    assert "no checkpoint" not in said.err
    again = json.loads(said.out)["report"]
    assert again["checks"] == first["checks"]
    assert again["training"] == first["training"]
    assert main(["train", "nothing.yaml", "--folder", str(folder)]) == 1
    assert "lenet5_admm_nn" in capsys.readouterr().err


@pytest.mark.parametrize(("kept", "epochs"), [({}, 1), ({"method": None, "finetune": 1}, 0)])
def test_a_network_of_the_zoo_is_loaded_without_its_class(
    kept: dict[str, object], epochs: int, tmp_path: Path
) -> None:
    method = {"batude": {"budget": {"params": 0.5}, "rounds": 1, "format": "svd"}}
    found = {"model": "digits_net", "data": "digits", "pretrain": epochs, "method": method, "control": False}
    artifact = Recipe.parse({**found, **kept}).run()
    assert artifact.report.model == "zoo:digits_net:10"
    artifact.save(tmp_path / "model.safetensors")
    loaded = tdpass.load(tmp_path / "model.safetensors").eval()
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), artifact.model.eval()(x))


def test_trained_weights_that_come_with_the_data_are_where_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset("digits", NETS.get("lenet5").sample)
    weights = NETS.get("lenet5").build()
    save_file(weights.state_dict(), tmp_path / "lenet5_digits.safetensors")
    known = replace(dataset, weights={"lenet5": tmp_path / "lenet5_digits.safetensors"})
    monkeypatch.setattr("tdpass.methods.material.open_dataset", lambda name, sample=None: known)
    material = gathered(Recipe(model="lenet5", data="digits", trained=True))
    assert material.pretrain == 0
    assert all(
        torch.equal(value, weights.state_dict()[name]) for name, value in material.model.state_dict().items()
    )
    (tmp_path / "lenet5_digits.safetensors").write_bytes(b"damaged")
    with pytest.raises(InvalidModelError, match="cannot be loaded"):
        gathered(Recipe(model="lenet5", data="digits", trained=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "lenet6"}, "unknown network 'lenet6' .did you mean 'lenet5'.*known: digits_net"),
        ({"data": "imagenet"}, "names no data set; give one of"),
        ({"test": "test"}, "'test' is a part of a data set"),
        ({"trained": True}, "names no data set"),
    ],
)
def test_names_that_mean_nothing_are_one_clear_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.parse(recipe(**change)).run()


def test_a_run_whose_data_is_missing_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDPASS_DATA", raising=False)
    with pytest.raises(UsageError, match=r"no file missing\.npz"):
        Recipe.parse(recipe(model="lenet5", data="missing.npz")).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--data", "scores.npz"], ["--set", "method.batude.budget=0.5"]])
@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_is_refused_leaves_no_folder_of_its_own(
    words: list[str], there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("scores.npz", x=np.zeros((4, 3)))
    if there:
        Path("runs/one").mkdir(parents=True)
    assert main(["train", "lenet5_cap", "--folder", "runs/one", *words, "--quiet"]) == 1
    assert {path.name for path in Path().rglob("*")} == {"scores.npz"} | ({"runs", "one"} if there else set())


@pytest.mark.parametrize("model", [f"{HERE}:network", "resnet20"])
def test_a_recipe_to_start_from_is_sound(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    path = tmp_path / "own.yaml"
    assert main(["train", str(path), "--init", model]) == 0
    assert f"tdpass train {path} --folder" in capsys.readouterr().out
    made = Recipe.load(path)
    assert (made.model, made.data, made.test, made.pretrain) == (model, "digits", "test", 12)
    assert path.read_text().count("#") > 10
    assert main(["train", str(path), "--init", model]) == 1
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot import"):
        starting_recipe("nowhere:net", "digits")


def ruined(model: nn.Module) -> float:
    return 90.0 if isinstance(model[1], nn.Linear) else 9.0


def test_a_network_that_training_destroyed_is_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe(test=f"{HERE}:ruined", pretrain=1)))
    assert main(["train", str(path), "--folder", str(folder), "--quiet"]) == 3
    assert (folder / "model.safetensors").is_file()
    assert "destroyed" in (folder / "report.json").read_text()


def test_what_train_lacks_is_said_and_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDPASS_DATA", raising=False)
    for module in ("torchvision", "hugging_face"):
        monkeypatch.setattr(f"tdpass.datasets.{module}.is_installed", lambda _: False)
    said = {
        ("lenet5_admm_nn", "--folder", str(tmp_path)): (1, "--data digits"),
        ("lenet5_admm_nn",): (2, "--folder"),
        (): (2, "name a recipe"),
        ("lenet5_admm_nn", "--data", "nothing", "--folder", str(tmp_path)): (1, "names no data set"),
    }
    for words, (code, message) in said.items():
        assert main(["train", *words]) == code
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "benchmarks" / "recipes").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_recipes_of_the_benchmarks_name_what_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    found = Recipe.load(path)
    assert found.about
    assert all(
        callable(named(text))
        for text in (found.model, found.data, found.test, found.evaluate)
        if text is not None and ":" in text
    )


@pytest.mark.parametrize("step", [1, 200])
def test_an_interrupted_command_says_how_to_go_on(
    step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe()))

    def called(self: ProgressBars, what: str, done: int, of: int) -> None:
        if done in {step, of}:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBars, "__call__", called)
    assert main(["train", str(path), "--folder", str(folder), "--checkpoint-every", "2"]) == 130
    said = capsys.readouterr().err
    assert ("the same command with --resume goes on" in said) == (step > 2)
    assert "interrupted" in said


def test_a_pipeline_takes_the_options_of_compress() -> None:
    pipeline = "plan{cycles=0.9},factorize"
    machine = {"target": "systolic:gemmini", "batch": 3}
    made = Recipe.parse(
        recipe(method=pipeline, compression=machine, control=False, calibration=f"{HERE}:images")
    ).run(progress=False)
    assert made.report.target.startswith("systolic, batch 3, ")
    assert made.report.checks["score_final"] >= made.report.checks["score_before_finetuning"]
    assert any(not choice.kept_dense for choice in made.plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "plan{params=0.5},factorize", "compression": {"targt": "cpu"}}, "did you mean 'target'"),
        ({"method": "plan{params=0.5},factorize", "compression": {"budget": 0.5}}, "unknown option 'budget'"),
        ({"compression": {"target": "cpu"}}, "options of a pipeline, and the method is none"),
        ({"method": None, "compression": {"target": "cpu"}}, "options of a pipeline"),
    ],
)
def test_options_that_no_pipeline_takes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.parse(recipe(**changes)).run(progress=False)
