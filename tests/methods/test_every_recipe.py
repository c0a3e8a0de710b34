"""Every training recipe runs on the digits that come with tdpass, through the whole command, in a minute."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import tdpass
from tdpass.cli import main
from tdpass.cli.train import DESTROYED
from tdpass.datasets import open_dataset, source_of
from tdpass.methods import METHODS
from tdpass.methods.base import Method
from tdpass.methods.recipe import Recipe, names
from tdpass.report import Report
from tdpass.zoo import NETS

AT_MOST = source_of("digits").epochs
SPARSEST = ("lenet5_crossbar_37x", "lenet5_crossbar_105x")  # for which there are too few steps to learn again
OWN = ("digits_widths", "digits_widths_and_ranks")  # recipes for the digits, which keep their epochs


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", names())
def test_a_recipe_trains_on_digits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", name, "--data", "digits", "--folder", str(tmp_path), "--json"])
    score = json.loads(capsys.readouterr().out)["report"]["checks"]["score_final"]
    if name in SPARSEST:
        assert code in (0, DESTROYED)
    else:
        assert code == 0
        assert score > 90
    report, plan = Report.load(tmp_path / "report.json"), tdpass.load_plan(tmp_path / "plan.json")
    assert report.training
    assert all(row.loss == row.loss and abs(row.loss) < 1e6 for row in report.training)
    assert {row.site for row in report.sites} == {choice.site for choice in plan}
    norms = 0.01 * report.original.params  # widths have batch-norms of their own
    assert report.final.params <= report.original.params + norms
    net = NETS.get(Recipe.load(name).model)
    loaded = tdpass.load(tmp_path / "model.safetensors", net.build(classes=10)).eval()
    answers = loaded(torch.rand(3, *open_dataset("digits", net.sample).sample))
    assert answers.shape == (3, 10)
    assert bool(torch.isfinite(answers).all())
    with (tmp_path / "log.csv").open(newline="", encoding="utf-8") as file:
        epochs = [(row["stage"], int(row["epoch"])) for row in csv.DictReader(file)]
    assert len(epochs) == len(report.training)
    if name not in OWN:
        assert max(epoch for stage, epoch in epochs if stage != "control") < AT_MOST
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", names())
def test_a_recipe_for_other_data_is_short_on_digits_and_says_so(name: str) -> None:
    recipe = Recipe.load(name)
    short = recipe.with_data("digits")
    assert short.at_most == (0 if name in OWN else AT_MOST)
    method, whole = short._method(), recipe._method()
    full = max(recipe.pretrain, recipe.finetune, recipe.epochs())
    assert bool(short.shorter()) == (name not in OWN and full > AT_MOST)
    if isinstance(method, Method) and isinstance(whole, Method):
        assert method.epochs(recipe.rounds_per_epoch) == (
            whole.epochs(recipe.rounds_per_epoch) if name in OWN else min(recipe.epochs(), AT_MOST)
        )
        kept = [(phase.name, phase.rounds > 0) for phase in whole.phases()]
        assert [(phase.name, phase.rounds > 0) for phase in method.phases()] == kept


def test_data_of_ones_own_keeps_every_epoch_unless_asked(tmp_path: Path) -> None:
    arrays = open_dataset("digits").training
    path = tmp_path / "own.npz"
    import numpy as np

    np.savez(path, x=arrays.inputs.numpy(), y=arrays.targets.numpy())
    recipe = Recipe.load("lenet5_cap").with_data(str(path))
    assert recipe.at_most == 0
    assert not recipe.shorter()
    asked = recipe.with_options(["at_most=2"])
    assert asked.epochs() == 2
    assert "2 of 3 in the method" in asked.shorter()


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize(("epochs", "rounds_per_epoch"), [(1, 1), (2, 3), (5, 2)])
def test_a_method_in_fewer_epochs_keeps_its_phases(name: str, epochs: int, rounds_per_epoch: int) -> None:
    options = {"admm-tt": {"budget": {"params": 0.5}}, "batude": {"budget": {"params": 0.5}}}
    options |= {
        "admm-nn": {"keep": 100, "bits_per_weight": 3},
        "crossbar": {"keep": 100},
        "lc": {"penalty": 1.0},
    }
    made = METHODS.get(name)(**options.get(name, {}))
    short = made.at_most(epochs, rounds_per_epoch)
    phases = [phase.name for phase in made.phases() if phase.rounds]
    assert [phase.name for phase in short.phases() if phase.rounds] == phases
    assert short.epochs(rounds_per_epoch) == max(epochs, -(-len(phases) // rounds_per_epoch))
    assert made.at_most(1000) is made
