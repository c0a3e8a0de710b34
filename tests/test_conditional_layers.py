"""Layers that some samples or some calls do not reach: experts, early exits, branches on values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.divergence import Divergence
from tdpass.planner.moments import stream_metrics
from tdpass.planner.repair import correct_biases, divergence_of, refit_last_factors
from tdpass.planner.sensitivity import Sweep
from tdpass.tape import site_order
from tdpass.verbs import compress


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pos, self.neg, self.head = (
            nn.Linear(16, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 6),
        )


class _Experts(_Layers):
    """Rows with x[0] > 0 go through `pos`, others through `neg`."""

    def forward(self, x: Tensor) -> Tensor:
        h, y = torch.relu(self.stem(x)), torch.zeros(x.shape[0], 24)
        for rows, expert in ((x[:, 0] > 0, self.pos), (x[:, 0] <= 0, self.neg)):
            if rows.any():
                y = y.index_copy(0, rows.nonzero()[:, 0], expert(h[rows]))
        return self.head(torch.relu(y))


class _Branch(_Layers):
    """All rows of a call go one way."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.head(torch.relu(self.pos(h) if bool(x[0, 0] > 0) else self.neg(h)))


class _Exit(_Layers):
    """Calls that begin with a row of x[0] > 0 leave after `pos`."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.pos(torch.relu(self.stem(x))))
        return self.head(h) if x[0, 0] > 0 else self.head(torch.relu(self.neg(h)))


class _Listed(_Layers):
    """The experts to run are read into Python."""

    def forward(self, x: Tensor) -> Tensor:
        h, y = torch.relu(self.stem(x)), torch.zeros(x.shape[0], 24)
        chosen = (h[:, 0] > h[:, 1]).long()
        for number in chosen.unique().tolist():
            rows = chosen == number
            y[rows] = (self.pos, self.neg)[number](h[rows])
        return self.head(torch.relu(y))


_NETS: list[type[_Layers]] = [_Experts, _Branch, _Exit, _Listed]


def _net(kind: type[_Layers]) -> _Layers:
    torch.manual_seed(1)
    return kind().eval()


def _calls() -> list[Tensor]:
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(2))
    pos, neg = x[x[:, 0] > 0], x[x[:, 0] <= 0]
    return [pos[:16], neg[:16], torch.cat([neg[16:32], pos[16:32]])]


@pytest.mark.parametrize("kind", _NETS)
@pytest.mark.parametrize("order", [lambda calls: calls, lambda calls: calls[::-1]], ids=["forth", "back"])
def test_a_layer_that_any_call_reaches_is_a_site_and_counted_as_often_as_it_runs(
    kind: type[_Layers], order: Callable[[list[Tensor]], list[Tensor]]
) -> None:
    net, calls = _net(kind), order(_calls())
    model = open_model(net)
    model.observe(*(Batch((call,)) for call in calls))
    assert {site.name for site in model.sites()} == {"stem", "pos", "neg", "head"}
    rows = dict.fromkeys(("stem", "pos", "neg", "head"), 0)
    for name in rows:

        def count(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            rows[name] += args[0].shape[0]

        net.get_submodule(name).register_forward_pre_hook(count)
    with torch.no_grad():
        for call in calls:
            net(call)
    samples = sum(map(len, calls))
    for site in model.sites():
        assert site.out_positions * samples == rows[site.name] * site.samples
    macs = sum(rows[site.name] * site.weights for site in model.sites())
    assert model.macs() == round(macs / samples)


def _rank_two(net: _Layers) -> dict[str, Layer]:
    model, svd = open_model(net), FORMATS.get("svd")
    model.observe(*(Batch((call,)) for call in _calls()))
    return {
        site.name: Layer(
            site, Form("svd", (2,)), svd.factorize(model.weight(site.name), site, (2,)), model.bias(site.name)
        ).to(torch.float32)
        for site in model.sites()
    }


@pytest.mark.parametrize("kind", _NETS)
def test_losses_metrics_and_repairs_use_the_runs_that_reach_a_site(kind: type[_Layers]) -> None:
    net, calls = _net(kind), _calls()
    model = open_model(net)
    model.observe(*(Batch((call,)) for call in calls))
    tapes = [model.record(Batch((call,))) for call in calls]
    assert sorted(site_order(tapes)) == ["head", "neg", "pos", "stem"]
    divergence = Divergence("mse")
    with torch.no_grad():
        measure = divergence.fit([divergence.outputs(tape.play().finish()) for tape in tapes])
    layers = _rank_two(net)
    sweep = Sweep(tapes, measure, 10_000)
    for name in ("neg", "stem", "pos", "head"):  # not in the order of any run
        swapped = _net(kind)
        with torch.no_grad():
            swapped.get_submodule(name).weight.copy_(layers[name].reconstruct())  # type: ignore[union-attr]
            pairs = [(divergence.outputs(net(call)), divergence.outputs(swapped(call))) for call in calls]
        assert sweep.loss({name: layers[name]}) == pytest.approx(measure.mean(pairs), rel=0.02)
    metrics = {site.name: metric for site, metric in stream_metrics(tapes, model.sites(), measure)}
    assert all(metric.inputs is not None and metric.outputs is not None for metric in metrics.values())
    before = divergence_of(tapes, layers, measure)
    corrected = correct_biases(tapes, layers, layers)
    refitted, declined = refit_last_factors(tapes, corrected, 1e-3, layers)
    routed_by_a_layer = (
        {"pos", "neg"} if kind is _Listed else set()
    )  # whose rows are others after compression
    assert set(declined) == routed_by_a_layer
    for name in {"pos", "neg", "head"} - routed_by_a_layer:
        assert not torch.equal(corrected[name].bias, layers[name].bias)  # type: ignore[arg-type]
        assert not torch.equal(refitted[name].factors["u"], layers[name].factors["u"])
    assert divergence_of(tapes, refitted, measure) < before


@pytest.mark.parametrize("kind", _NETS)
def test_such_a_model_is_planned_and_carried_out(kind: type[_Layers]) -> None:
    net, calls = _net(kind), _calls()
    made = compress(net, {"params": 0.6}, calls, cache=False, formats=["svd"])
    assert made.plan is not None
    assert {choice.site for choice in made.plan} == {"stem", "pos", "neg", "head"}
    assert not made.report.declined
    assert made.report.checks["divergence"] <= 2 * made.plan.loss
    again = compress(net, plan=made.plan, data=calls, cache=False)
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(again.model(call), made.model(call))  # type: ignore[operator]


def test_a_site_that_the_first_samples_do_not_reach_is_tried_on_others() -> None:
    net, (pos, neg, _) = _net(_Branch), _calls()
    model = open_model(net)
    calls = [pos] * 7 + [neg]
    model.observe(*(Batch((call,)) for call in calls))
    tapes = [model.record(Batch((call,))) for call in calls]
    divergence = Divergence("mse")
    with torch.no_grad():
        measure = divergence.fit([divergence.outputs(tape.play().finish()) for tape in tapes])
    layer = _rank_two(net)["neg"]
    few, all_of_them = (Sweep(tapes, measure, samples).loss({"neg": layer}) for samples in (16, 10_000))
    assert few == pytest.approx(all_of_them)
    assert few > 0
