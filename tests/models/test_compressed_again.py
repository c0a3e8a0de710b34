"""A compressed model is compressed again: what came factored is a site; budgets are of what came."""

from __future__ import annotations

import copy

import pytest
import torch
from onnx_nets import to_onnx
from torch import nn

import tdpass
from tdpass.form import DENSE
from tdpass.layers.factorized import Factorized
from tdpass.methods import AdmmTT
from tdpass.models import open_model


class Tied(nn.Module):
    """One weight under two layers with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Table(nn.Module):
    """Reads rows of a table, which may be its head as well."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words, self.mix, self.head = (
            nn.Embedding(48, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 48, bias=False),
        )
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.words(x.mul(8).abs().long().clamp_max(47)))))


def _convs(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


IMAGES, ROWS = (16, 6, 9, 9), (32, 24)
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24)), ROWS),
    "tied": (Tied, ROWS),
    "table": (lambda: Table(tied=False), ROWS),
    "tied table": (lambda: Table(tied=True), ROWS),
    "convolutions": (lambda: _convs(nn.Conv2d(6, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 24, 3)), IMAGES),
    "grouped": (lambda: _convs(nn.Conv2d(6, 24, 3, groups=2), nn.ReLU(), nn.Conv2d(24, 24, 3)), IMAGES),
    "reflected": (lambda: _convs(nn.Conv2d(6, 24, 3, padding=1, padding_mode="reflect")), IMAGES),
    "transposed": (lambda: _convs(nn.ConvTranspose2d(6, 24, 3, 2, 1, 1)), IMAGES),
}


def _made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    network, sizes = NETWORKS[name]
    module, x = network().eval(), torch.randn(sizes)
    module(x)
    return module, x


def _compress(
    model: object, budget: object = None, data: object = None, **options: object
) -> tdpass.Artifact:
    return tdpass.compress(model, budget, data, effort="fast", progress=False, cache=False, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_that_came_factored_gets_smaller_still(name, tmp_path):
    dense, x = _made(name)
    kept = copy.deepcopy(dense)
    once = _compress(dense, {"params": 0.7}, x)
    given = once.report.final
    answers = once.model(x)
    twice = _compress(once.model, {"params": 0.75}, x)

    torch.testing.assert_close(once.model(x), answers)  # it is left untouched
    assert twice.report.original == given
    assert twice.report.final.params == sum(p.numel() for p in twice.model.parameters())
    assert twice.report.final.params <= 0.75 * given.params
    assert twice.report.final.params <= twice.plan.planned.params <= 0.75 * given.params
    assert not any("already" in reason for reason in twice.report.declined.values())
    twice.save(tmp_path / "twice.safetensors")
    for onto in (kept, once.model):
        loaded = tdpass.load(tmp_path / "twice.safetensors", copy.deepcopy(onto))
        torch.testing.assert_close(loaded(x), twice.model(x))


@pytest.mark.parametrize("name", ["linear", "convolutions", "tied table"])
def test_its_plan_applies_to_it_and_to_the_dense_model(name):
    dense, x = _made(name)
    once = _compress(dense, {"params": 0.7}, x)
    plan = tdpass.RankPlan.from_json(_compress(once.model, {"params": 0.75}, x).plan.to_json())
    wanted = {choice.site: choice.form for choice in plan if choice.form != DENSE}
    for given in (once.model, dense):
        made = _compress(given, data=x, plan=plan)
        opened = open_model(made.model)
        found = {site.name: layer.form for site in opened.sites() if (layer := opened.layer(site.name))}
        assert found == wanted
        assert made.plan.planned.params == pytest.approx(made.report.final.params, rel=0.02)


def test_the_lower_rank_of_what_came_is_the_best_one():
    torch.manual_seed(0)
    weight = torch.randn(40, 30).double() @ torch.diag(0.7 ** torch.arange(30.0)).double()
    dense = nn.Sequential(nn.Linear(30, 40, bias=False)).double()
    dense[0].weight.data = weight
    once = _compress(dense, {"params": 0.6}, formats=("svd",))
    twice = _compress(once.model, {"params": 0.5}, formats=("svd",))
    rank = twice.plan.get("0").rank[0]
    assert rank < once.plan.get("0").rank[0]
    values = torch.linalg.svdvals(weight)
    error = float((twice.model[0].product().detach() - weight).norm())
    assert error == pytest.approx(float(values[rank:].norm()), rel=1e-6)


def test_what_the_budget_has_room_for_stays_as_it_came():
    dense, x = _made("linear")
    once = _compress(dense, {"params": 0.6}, x)
    before = {name: value.clone() for name, value in once.model.state_dict().items()}
    planned = tdpass.make_plan(once.model, {"params": 1.0}, x, effort="fast", progress=False, cache=False)
    assert planned.report.final == once.report.final
    assert all(choice.kept and choice.loss == 0 for choice in planned.plan)
    torch.testing.assert_close(dict(planned.model.state_dict()), before)


def test_layers_that_are_left_out_stay_as_they_came():
    dense, x = _made("linear")
    once = _compress(dense, {"params": 0.6}, x, include=("0",))
    form = once.model[0].form
    twice = _compress(once.model, {"params": 0.8}, x, exclude=("0",))
    assert twice.model[0].form == form
    assert twice.report.final.params <= 0.8 * once.report.final.params
    assert twice.plan.planned.params == pytest.approx(twice.report.final.params, rel=0.02)


def test_factors_in_bytes_are_not_made_larger():
    dense, x = _made("linear")
    once = _compress(dense, {"bytes": 0.2}, x)
    twice = _compress(once.model, {"bytes": 0.7}, x)
    assert any(isinstance(part, Factorized) and part.form.encoded for part in once.model.modules())
    assert twice.report.final.bytes <= 0.7 * once.report.final.bytes
    assert all(choice.cost.bytes <= choice.dense.bytes for choice in twice.plan)


def test_layers_with_fewer_channels_are_left_with_their_neighbours():
    dense, x = _made("convolutions")
    once = _compress(dense, pipeline="plan{params=0.4},factorize", data=x)
    narrow = {
        name for name, part in once.model.named_modules() if isinstance(part, Factorized) and part.form.narrow
    }
    again = _compress(once.model, {"params": 0.9}, x)
    assert {name for name, reason in again.report.declined.items() if "neighbours" in reason} == narrow


@pytest.mark.parametrize("name", ["linear", "convolutions"])
def test_the_factors_of_an_onnx_model_are_sites(name, tmp_path):
    dense, x = _made(name)
    once = _compress(to_onnx(dense, x), {"params": 0.7}, x)
    once.save(tmp_path / "once.onnx")
    twice = _compress(tmp_path / "once.onnx", {"params": 0.75}, x)
    assert twice.report.original == once.report.final
    assert twice.report.final.params <= 0.75 * once.report.final.params
    again = _compress(tmp_path / "once.onnx", data=x, plan=twice.plan)
    assert again.report.final.params == twice.report.final.params
    twice.save(tmp_path / "twice.onnx")
    assert open_model(tmp_path / "twice.onnx").params() == twice.report.final.params


def test_training_methods_leave_alone_what_came_factored():
    dense, x = _made("linear")
    once = _compress(dense, {"params": 0.6}, x, include=("0",))
    method = AdmmTT(budget={"params": 0.5})
    method.prepare(once.model, x)
    assert "0" not in method.sites
