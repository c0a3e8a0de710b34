"""HALOC: forms chosen while training, under what they cost on a machine; what was predicted is measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.errors import BudgetError, UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer, cost_of, shrinks
from tdpass.methods import Haloc
from tdpass.methods.calibrated import Tried, losses_of
from tdpass.methods.menu import Menu
from tdpass.methods.tariff import Tariff
from tdpass.models import Batch, Model
from tdpass.planner.effort import EFFORTS
from tdpass.site import Site
from tdpass.targets import Setting, Target, TimedTarget, Timing, open_target
from tdpass.training.batches import Batches

CONV = Site("c", "conv", (32, 24, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), extents=(((8, 8), (8, 8)),))
SHORT: dict[str, Any] = {"warm": 1, "search": 3, "tune": 1, "ranks": 3}


class Machine(TimedTarget):
    """A machine on which time follows multiply-adds, and networks take something beside their layers."""

    name = "machine"

    def __init__(self, rest: float = 0.0, surprise: float = 1.0) -> None:
        super().__init__()
        self.rest, self.surprise = rest, surprise

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> Target:
        return cls()

    def time(
        self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False
    ) -> list[Timing]:
        return [Timing(cost_of(site, form).macs * 1e-9, "fake") for form in forms]

    def time_models(
        self, models: Sequence[Model], batch: Batch, setting: Setting, yardstick: Site | None = None
    ) -> list[float]:
        times = []
        for model in models:
            layers = [(site, model.layer(site.name)) for site in model.sites()]
            whole = sum(
                cost_of(site, DENSE if layer is None else layer.form).macs * 1e-9 for site, layer in layers
            )
            changed = any(layer is not None for _, layer in layers)
            times.append((self.rest + whole) * (self.surprise if changed else 1.0))
        return times


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = (
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 16, 3, padding=1),
        )
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.norm(self.one(x))))).mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two kinds of stripes, in noise."""
    labels = torch.arange(count) % 2
    stripes = torch.stack([torch.eye(8)[::2].repeat_interleave(2, 0), torch.eye(8).flip(0)])
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 0.3 + stripes[
        labels, None
    ], labels


def train(calibration: Tensor | None = None, **options: Any) -> tdpass.Artifact:
    x = torch.zeros(2, 1, 8, 8)
    common: dict[str, Any] = {
        "settings": {"lr": 0.05},
        "control": False,
        "example_inputs": x,
        "calibration": calibration,
    }
    return tdpass.train(network(), Batches(*images(64, 1), 16), Haloc(**{**SHORT, **options}), **common)


@pytest.mark.parametrize("target", [None, "systolic:gemmini", Machine()])
def test_a_menu_holds_few_forms_that_are_cheaper_than_dense(target: str | Target | None) -> None:
    tariff = (
        Tariff("macs")
        if target is None
        else Tariff(open_target(target, "torch").measures[0], open_target(target, "torch"))
    )
    menu = Menu.of(CONV, ("svd", "spatial_svd", "tucker2"), 5, tariff)
    assert menu.forms[0] == DENSE
    assert menu.costs == tuple(tariff.amounts(CONV, menu.forms))
    assert {form.format for form in menu.forms[1:]} == {"spatial_svd", "tucker2"}
    assert all(cost < menu.costs[0] for cost in menu.costs[1:])
    assert all(shrinks(CONV, form.format, form.rank) for form in menu.forms[1:])
    for name in ("spatial_svd", "tucker2"):
        ranks = [form.rank for form in menu.forms if form.format == name]
        assert 2 <= len(ranks) <= 5
        if target is not None:
            assert set(ranks) <= set(tariff.target.filling(CONV, name, FORMATS.get(name).ranks(CONV)))
    assert any(len(set(form.rank)) > 1 for form in menu.forms)  # the two Tucker ranks may differ


def test_a_budget_on_seconds_is_met_and_prediction_is_held_against_measurement() -> None:
    artifact = train(images(32, 2)[0], budget={"seconds": 0.4}, target=Machine(rest=1e-5, surprise=1.1))
    report = artifact.report
    dense = sum(choice.dense.macs for choice in artifact.plan) * 1e-9
    chosen = sum(cost_of(site, artifact.plan.get(site.name).form).macs for site in sites_seen()) * 1e-9
    assert chosen <= 0.4 * dense
    assert report.checks["predicted_seconds"] == pytest.approx(1e-5 + chosen)
    assert report.checks["measured_seconds"] == pytest.approx(1.1 * (1e-5 + chosen))
    assert report.original.seconds == pytest.approx(1e-5 + dense)
    assert report.final.seconds == report.checks["measured_seconds"]
    assert report.target == "machine, batch 1, 1 thread"
    assert any("+10.0%" in note for note in report.notes)


@pytest.mark.parametrize("surprise", [0.9, 30.0])
def test_an_assembled_network_that_is_slower_than_the_dense_one_is_named(surprise: float) -> None:
    notes = train(images(32, 2)[0], budget={"seconds": 0.4}, target=Machine(surprise=surprise)).report.notes
    assert any("keep the dense network" in note for note in notes) == (surprise > 1)


def sites_seen() -> list[Site]:
    model = tdpass.open_model(network(), torch.zeros(2, 1, 8, 8))
    model.observe(Batch((torch.zeros(2, 1, 8, 8),)))
    return list(model.sites())


def test_on_a_modelled_target_prediction_and_measurement_are_the_same() -> None:
    checks = train(target="systolic:gemmini", budget={"cycles": 0.9}).report.checks
    assert checks["predicted_cycles"] == checks["measured_cycles"] > 0


def test_the_dense_answers_keep_what_the_network_needs() -> None:
    data, labels = images(64, 2)
    model, batches = network(), Batches(*images(64, 1), 16)
    settings = {"lr": 0.02, "schedule": 1.0, "clip": 1.0}
    common: dict[str, Any] = {
        "example_inputs": data[:2],
        "calibration": data,
        "pretrain": 12,
        "pretraining": {"lr": 0.05},
        "control": False,
    }
    artifact = tdpass.train(
        model, batches, Haloc(penalty=0.3, search=8, tune=8, ranks=3), settings=settings, **common
    )
    right = float((artifact.model(data).argmax(1) == labels).float().mean())
    assert right > 0.95
    assert artifact.report.final.macs < 0.7 * artifact.report.original.macs
    assert not any("without calibration data" in note for note in artifact.report.notes)
    assert any("without calibration data" in note for note in train().report.notes)


def test_a_higher_penalty_buys_a_cheaper_network() -> None:
    macs = [train(penalty=penalty, search=12, rate=0.1).report.final.macs for penalty in (0.0, 30.0)]
    assert macs[1] < 0.5 * macs[0]


def test_counted_costs_are_predicted_exactly() -> None:
    checks = train(budget={"params": 0.5}).report.checks
    assert checks["predicted_params"] == checks["measured_params"]
    assert train(measure="bytes").report.checks.keys() >= {"predicted_bytes", "measured_bytes"}
    report = train(budget={"bytes": 0.5}).report
    assert report.checks["predicted_bytes"] == report.checks["measured_bytes"]
    assert report.final.bytes <= 0.5 * report.original.bytes


def test_the_prepared_network_is_what_is_attached() -> None:
    model, method = network(), Haloc(**SHORT)
    method.prepare(model, torch.zeros(2, 1, 8, 8))
    with pytest.raises(UsageError, match=r"prepare\(\) returned"):
        method.attach(model, torch.optim.SGD(model.parameters(), 0.1), every=2)
    with pytest.raises(UsageError, match="measure='params'"):
        Haloc(**SHORT).prepare(network())


def test_a_budget_on_what_the_target_does_not_tell_is_refused() -> None:
    for name in ("haloc", "batude", "lc"):
        method = tdpass.methods.METHODS.get(name)(budget={"macs": 0.5}, target="systolic:gemmini")
        with pytest.raises(BudgetError, match="bounds nothing that target systolic tells"):
            method.prepare(network(), torch.zeros(2, 1, 8, 8))


WRONG: list[dict[str, Any]] = [
    {"formats": ["tensor_ring"]},
    {"formats": []},
    {"measure": "seconds"},
    {"ranks": 0},
    {"every": 0},
    {"penalty": -1.0},
    {"approach": -1.0},
    {"temperature": -1.0},
    {"begin": "anywhere"},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        Haloc(**wrong)


class Branches(nn.Module):
    """Layers side by side, each on its own inputs, of planted ranks in the half of its outputs that is read.

    What is not read has other ranks, which mislead a choice by the weights alone.
    """

    width = 24

    def __init__(self, ranks: Sequence[int], unread: Sequence[int]) -> None:
        super().__init__()
        half = self.width // 2
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in ranks)
        self.out = nn.Linear(self.width * len(ranks), 6)
        with torch.no_grad():
            self.out.weight.normal_(std=0.5)
            for place, (layer, read, other) in enumerate(zip(self.layers, ranks, unread, strict=True)):
                layer.weight.copy_(torch.cat([self._of_rank(half, rank) for rank in (read, other)]))
                self.out.weight[:, place * self.width + half : (place + 1) * self.width] = 0

    def _of_rank(self, rows: int, rank: int) -> Tensor:
        u, v = (torch.linalg.qr(torch.randn(size, rank))[0] for size in (rows, self.width))
        return 0.8 * (self.width / rank) ** 0.5 * u @ v.T

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.layers, x.split(self.width, 1), strict=True)
        return self.out(torch.cat([torch.tanh(layer(part)) for layer, part in parts], 1))


PLANTED, UNREAD = (2, 8, 5, 3), (8, 1, 3, 5)


def search(**options: Any) -> list[int]:
    """The ranks that are chosen at the multiply-adds of the planted ones."""
    torch.manual_seed(0)
    net = Branches(PLANTED, UNREAD)
    x, held = (torch.randn(count, 4 * Branches.width) for count in (768, 384))
    with torch.no_grad():
        batches = Batches(x, net(x).argmax(1), 32)
    least = 2 * Branches.width * sum(PLANTED) + net.out.weight.numel()
    whole = 4 * Branches.width**2 + net.out.weight.numel()
    method = Haloc(
        budget={"macs": least / whole + 1e-6},
        formats=("svd",),
        ranks=11,
        warm=1,
        tune=0,
        exclude=("out",),
        **options,
    )
    common: dict[str, Any] = {"settings": {"lr": 0.003}, "control": False, "example_inputs": x[:2]}
    artifact = tdpass.train(net, batches, method, calibration=held, **common)
    return [artifact.plan.get(f"layers.{place}").rank[0] for place in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("begin", ["uniform", "weights"])
def test_a_search_finds_planted_ranks_from_a_start_that_does_not_show_them(begin: str) -> None:
    found, start = (
        sum(
            abs(rank - planted)
            for rank, planted in zip(search(begin=begin, rate=0.1, search=rounds), PLANTED, strict=True)
        )
        for rounds in (12, 0)
    )
    assert found <= 3
    assert found < start


def test_measured_losses_begin_at_planted_ranks() -> None:
    assert search(begin="losses", search=0) == list(PLANTED)


@pytest.mark.slow
def test_a_search_keeps_the_ranks_that_losses_show() -> None:
    assert search(begin="losses", search=12) == list(PLANTED)


def test_losses_are_those_of_one_layer_alone_in_a_form() -> None:
    torch.manual_seed(0)
    net, x = Branches(PLANTED, UNREAD), torch.randn(96, 4 * Branches.width)
    model = tdpass.open_model(net, x[:2])
    model.observe(Batch((x[:2],)))
    weights = [net.layers[0].weight.detach() * factor for factor in (0.0, 0.5, 1.0)]
    site = next(site for site in model.sites() if site.name == "layers.0")
    tried = Tried(
        [partial(Layer, site, DENSE, {"kernel": weight}, net.layers[0].bias) for weight in weights],
        [1.0, 0.5, 0.0],
    )
    found = losses_of(model, {"layers.0": tried}, [Batch((x[:48],)), Batch((x[48:],))])["layers.0"]
    assert losses_of(model, {"layers.0": tried}, [Batch((x[:48],)), Batch((x[48:],))])["layers.0"] == found
    with torch.no_grad():
        wanted = net(x).log_softmax(1)
        for weight, loss in zip(weights, found, strict=True):
            net.layers[0].weight.copy_(weight)
            changed = net(x).log_softmax(1)
            divergence = torch.nn.functional.kl_div(changed, wanted, reduction="batchmean", log_target=True)
            assert loss == pytest.approx(float(divergence), rel=1e-4, abs=1e-6)
            net.layers[0].weight.copy_(weights[-1])


def test_fewer_forms_are_measured_of_a_model_that_takes_long() -> None:
    small, large = (EFFORTS["normal"].of(macs) for macs in (10**7, 10**11))
    assert small.for_candidates(20, 256) > large.for_candidates(20, 256)
    assert large.for_candidates(2000, 4096) == 1


class Hasty(Machine):
    """Forms of one format look twice as fast as they are, unless they are measured with care."""

    def time(
        self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False
    ) -> list[Timing]:
        found = super().time(site, forms, setting)
        hurried = [0.5 if form.format == "spatial_svd" and not careful else 1.0 for form in forms]
        return [Timing(timing.seconds * share, "fake") for timing, share in zip(found, hurried, strict=True)]


def test_prices_of_what_is_chosen_are_made_sure_of() -> None:
    report = (artifact := train(images(32, 2)[0], budget={"seconds": 0.4}, target=Hasty())).report
    dense = sum(choice.dense.macs for choice in artifact.plan) * 1e-9
    chosen = sum(cost_of(site, artifact.plan.get(site.name).form).macs for site in sites_seen()) * 1e-9
    assert chosen <= 0.4 * dense
    assert report.checks["predicted_seconds"] == pytest.approx(report.checks["measured_seconds"])
