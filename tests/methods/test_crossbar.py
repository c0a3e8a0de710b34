"""The method for memristor arrays: what its weights end in, what its arrays hold and cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_run import data, network, trained_by

import tdpass
from tdpass.crossbars import Devices, map_model, simulate
from tdpass.crossbars.use import dense_costs, uses_of
from tdpass.errors import BudgetError, UsageError
from tdpass.methods import Crossbar
from tdpass.targets.crossbar import CrossbarArray
from tdpass.targets.workload import as_matrices
from tdpass.training.fixed_signs import FixedSigns
from tdpass.training.noise import NoisyWeights

CASES: dict[str, dict[str, Any]] = {
    "blocks": {"keep": 500, "admm": 3, "retrain": 1, "fix": 2, "rho": 0.5},
    "five bits, noise": {
        "keep": 500,
        "weight_bits": 5,
        "side": "row",
        "admm": 3,
        "retrain": 2,
        "fix": 1,
        "rho": 0.5,
        "noise": 0.1,
        "metric": "fisher",
    },
    "fragments": {
        "groups": {"2": {"filter": 0.5, "column": 0.5}},
        "array": "forms",
        "admm": 4,
        "retrain": 0,
        "fix": 2,
        "rho": 0.5,
    },
    "both": {
        "keep": 500,
        "groups": {"*": {"column": 0.6}},
        "weight_bits": 6,
        "admm": 4,
        "retrain": 2,
        "fix": 0,
        "rho": 0.5,
        "exclude": ["6"],
    },
}
each_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def trained(options: dict[str, Any]) -> tuple[Crossbar, tdpass.Artifact]:
    method = Crossbar(**options)
    return method, trained_by(method)


def weights_of(artifact: tdpass.Artifact) -> dict[str, torch.Tensor]:
    return {
        choice.site: dict(artifact.model.named_modules())[choice.site].weight.detach()
        for choice in artifact.plan
    }


@each_case
def test_weights_end_in_groups_on_levels_of_devices_and_in_fragments_of_one_sign(
    options: dict[str, Any],
) -> None:
    method, artifact = trained(options)
    for name, weight in weights_of(artifact).items():
        levels = method.levels[name]
        ratios = weight[weight != 0].abs().double() / levels.scale
        states = torch.tensor(levels.magnitudes, dtype=torch.float64)
        assert float((ratios[:, None] - states).abs().min(1).values.max()) < 1e-6
        assert levels.magnitudes[0] == pytest.approx(
            method.machine.least_siemens / method.machine.most_siemens
        )  # no state is zero
        matrix = as_matrices(weight, 1)[0]
        if options.get("array") == "forms":
            for run in matrix.split(8):
                assert not ((run > 0).any(0) & (run < 0).any(0)).any()
        site = method.sites[name]
        if name in options.get("groups", {}):
            assert int(weight.flatten(1).any(1).sum()) <= round(options["groups"][name]["filter"] * site.o)
            assert int(weight.flatten(1).any(0).sum()) <= round(
                options["groups"][name]["column"] * site.weights / site.o
            )


@each_case
def test_the_report_has_the_cost_of_the_arrays_that_are_left(options: dict[str, Any]) -> None:
    method, artifact = trained(options)
    report, weights = artifact.report, weights_of(artifact)
    uses, before = uses_of(method.sites, weights, method.machine), dense_costs(method.sites, method.own)
    for measure in ("joules", "area", "cycles"):
        assert report.original.get(measure) == pytest.approx(
            sum(cost.get(measure) for cost in before.values())
        )
        assert report.final.get(measure) == pytest.approx(sum(use.cost.get(measure) for use in uses.values()))
        assert sum(choice.cost.get(measure) for choice in artifact.plan) == pytest.approx(
            report.final.get(measure)
        )
    assert 0 < report.final.get("joules") < report.original.get("joules")
    assert {row.site: row.after.get("area") for row in report.sites} == {
        name: use.cost.get("area") for name, use in uses.items()
    }
    assert sum(block.weights for row in report.arrays for block in row.blocks) == sum(
        int(weight.count_nonzero()) for weight in weights.values()
    )
    assert tdpass.Report(**vars(report)).to_json() == report.to_json()


def test_fewer_bits_and_weights_take_fewer_arrays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 4))
    artifact = tdpass.train(
        net,
        [(torch.randn(8, 128), torch.arange(8) % 4)],
        {"crossbar": {"keep": 1000, "weight_bits": 5, "admm": 4, "retrain": 0, "fix": 1}},
        settings={"lr": 0.01},
        control=False,
        example_inputs=torch.zeros(2, 128),
    )
    # 4 x 3 and 3 x 1 blocks of 32 x 32, four arrays each at 9 bits and two at 5
    area = CrossbarArray.load("admm_32x32").array_area()
    assert artifact.report.original.get("area") == pytest.approx(15 * 4 * area)
    assert artifact.report.final.get("area") < 15 * 2 * area


def test_noise_is_drawn_anew_in_every_step_and_gone_at_the_end() -> None:
    weight = nn.Parameter(torch.ones(4000))
    weight.data[:100] = 0
    clean = weight.detach().clone()
    term = NoisyWeights({"w": weight}, 0.2, [FixedSigns({"w": weight})])
    optimizer = torch.optim.SGD([weight], lr=0.0)
    draws = []
    term.begin_round(0.0)
    for _ in range(2):
        draws.append(weight.detach().clone())
        term.before_step(optimizer)
        assert torch.equal(weight.detach(), clean)
        term.after_step(optimizer)
    assert not torch.equal(draws[0], draws[1])
    assert not draws[0][:100].any()
    assert float(draws[0][100:].log().std()) == pytest.approx(0.2, rel=0.05)
    assert float(draws[0][100:].log().mean()) == pytest.approx(0.0, abs=0.02)
    term.end()
    assert torch.equal(weight.detach(), clean)


@pytest.mark.slow
def test_what_was_trained_with_noise_loses_less_on_devices_that_vary() -> None:
    options: dict[str, Any] = {"keep": 900, "weight_bits": 5, "admm": 4, "retrain": 12, "fix": 4, "rho": 0.5}
    images, labels = data().inputs, data().targets

    @torch.no_grad()
    def loss(net: nn.Module) -> float:
        return float(F.cross_entropy(net(images), labels))

    found = []
    for noise in (0.0, 0.5):
        method, artifact = trained({**options, "noise": noise})
        assert isinstance(artifact.model, nn.Module)
        model = artifact.model.eval()
        found.append(
            simulate(model, map_model(model, method.machine), loss, Devices(variation=0.5), draws=10)
        )
        assert loss(model) < 1e-3
    without, noisy = found
    assert noisy.mean < 0.5 * without.mean
    assert noisy.deviation < without.deviation


def test_nothing_changes_sides() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    term = FixedSigns({"w": weight})
    weight.data = torch.tensor([-0.5, -1.0, 3.0])
    term.after_step(torch.optim.SGD([weight], lr=0.1))
    assert weight.tolist() == [0.0, -1.0, 0.0]
    weight.data = torch.tensor([0.5, 1.0, 3.0])
    term.after_step(torch.optim.SGD([weight], lr=0.1))
    assert weight.tolist() == [0.5, 0.0, 0.0]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "give keep"),
    ({"keep": 10**6}, "more than the"),
    ({"keep": 900, "array": "isaac"}, "priced, not mapped"),
    ({"keep": 900, "array": "nowhere"}, "admm_32x32"),
    ({"keep": 900, "weight_bits": 1}, "weight_bits=1"),
    ({"keep": 900, "side": "top"}, "row, column"),
    ({"groups": {"2": {"kernel": 0.5}}}, "kernel: 0.5"),
    ({"groups": {"nothing": {"filter": 0.5}}}, "matches no site"),
    ({"keep": 900, "reach": 1.0}, "reach=1.0"),
    ({"keep": 900, "rates": {"prune": 2.0}}, "the phases are admm, retrain, fix"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_wrong_options_are_one_clear_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Crossbar(**options).prepare(network())


def test_an_impossible_number_of_weights_is_refused_before_training() -> None:
    with pytest.raises(BudgetError, match="below the smallest reachable"):
        Crossbar(keep=200, least=0.9).prepare(network())


def test_states_of_devices_are_data(tmp_path: Path) -> None:
    array = CrossbarArray.load("admm_32x32")
    text = CrossbarArray.presets()["admm_32x32"].read_text().replace("weight_bits: 9", "weight_bits: 2")
    text = text.replace("cell_bits: 4", "cell_bits: 1\nstates: [2.0e-7, 9.0e-7]")
    own = tmp_path / "own.yaml"
    own.write_text(text)
    method = Crossbar(keep=900, array=str(own))
    assert method.states.magnitudes == (pytest.approx(2 / 9), 1.0)
    assert method.machine == replace(
        array, cell_bits=1, weight_bits=2, states=(2e-7, 9e-7), sources=method.machine.sources
    )
