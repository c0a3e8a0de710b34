"""A method that did not do what was asked says so, and nothing comes out larger than it went in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import tdpass
from tdpass.cost import Cost
from tdpass.errors import BudgetError, UsageError
from tdpass.html_report import render_html
from tdpass.methods import AdmmNN, AdmmTT, ChannelAdaptive, make_method
from tdpass.models import open_model
from tdpass.packing import StoredSize
from tdpass.report import Report, TrainingRow
from tdpass.terminal import report_view
from tdpass.training.batches import Batches
from tdpass.views.tables import to_text

X = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 2))


def own_loop(
    model: nn.Sequential,
    held: Callable[[], list[nn.Parameter]],
    steps: Callable[[], list[nn.Parameter]] | None,
    count: int,
) -> tdpass.Artifact:
    method = AdmmTT(budget={"params": 0.5}, rounds=3, rho=0.1)
    attached = torch.optim.SGD(held(), 0.05)
    method.attach(model, attached, every=2)
    optimizer = attached if steps is None else torch.optim.SGD(steps(), 0.05)
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return method.finish(model)


def test_rounds_that_never_ran_are_told_first() -> None:
    model = network()
    whole = lambda: list(model.parameters())  # noqa: E731 - asked again for each optimizer
    first = own_loop(model, whole, whole, 6).report.notes[0]
    assert "0 of the 3 rounds" in first
    assert "no step" in first
    assert "2 of the 3 rounds" in own_loop(model, whole, None, 3).report.notes[0]
    assert not any(
        "of the 3 rounds" in note or "did not train" in note
        for note in own_loop(model, whole, None, 6).report.notes
    )


def test_weights_that_never_moved_are_named() -> None:
    model = network()
    assert "did not train 0:" in own_loop(model, lambda: list(model[2].parameters()), None, 6).report.notes[0]
    model[0].requires_grad_(False)
    assert (
        "did not train 0:"
        in own_loop(model, lambda: [p for p in model.parameters() if p.requires_grad], None, 6).report.notes[
            0
        ]
    )


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("shape", [(64, 512), (512, 64), (96, 96)])
def test_a_budget_makes_no_layer_larger_in_any_measure(shape: tuple[int, int], seen: bool) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(shape[1], shape[0]), nn.ReLU(), nn.Linear(shape[0], shape[0])),
        torch.randn(3, shape[1]),
    )
    method = AdmmTT(budget={"params": 0.5}, rounds=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    method.attach(model, optimizer, every=1, example_inputs=x if seen else None)
    optimizer.step()
    artifact = method.finish(model)
    before, after = (open_model(module, x).macs() for module in (model, artifact.model))
    assert after <= before
    assert artifact.report.final.params <= 0.5 * artifact.report.original.params
    left = {choice.site: choice.reason for choice in artifact.plan if choice.kept_dense}
    assert all(left.values())
    said = to_text(report_view(artifact.report, artifact.plan, 300), 300)
    assert all(said.count(reason) == 1 for reason in set(left.values()))  # together, in the table


def test_ranks_that_make_a_layer_larger_are_told() -> None:
    model = network()
    artifact = tdpass.train(
        model, Batches(X, Y, 32), {"admm-tt": {"ranks": {"0": {"svd": [24]}}, "rounds": 0}}, control=False
    )
    assert any("0 is larger in a measure as svd of rank (24,)" in note for note in artifact.report.notes)


def test_fitted_to_data_layers_without_biases_stay_within_the_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 16, bias=False),
    )
    artifact = tdpass.train(
        model,
        Batches(X, Y, 32),
        {"admm-tt": {"budget": {"params": 0.5}, "rounds": 0}},
        control=False,
        calibration=X,
    )
    assert artifact.report.final.params <= 0.5 * artifact.report.original.params


def test_every_layer_keeps_a_share() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    rows = tdpass.train(
        model,
        Batches(X, Y, 32),
        {"admm-nn": {"keep": 400, "prune": 2, "retrain": 0, "rho": 1e-3}},
        control=False,
    )
    kept = {
        name: int(module.weight.count_nonzero())
        for name, module in rows.model.named_modules()
        if hasattr(module, "weight")
    }
    assert sum(kept.values()) <= 400
    assert kept["2"] >= int(0.1 * 400 * 64 / (24 * 32 + 64))
    cut = tdpass.train(
        model,
        Batches(X, Y, 32),
        {"admm-nn": {"keep": 400, "prune": 2, "retrain": 0, "rho": 1e-3, "least_share": 0.0}},
        control=False,
    )
    assert int(cut.model[2].weight.count_nonzero()) == 1
    with pytest.raises(UsageError, match="least_share=2"):
        AdmmNN(keep=400, least_share=2)


def test_pruned_layers_are_not_called_dense() -> None:
    method = {
        "admm-nn": {"keep": 300, "bits_per_weight": 3, "prune": 1, "retrain": 0, "quantize": 1, "fix": 1}
    }
    artifact = tdpass.train(network(), Batches(X, Y, 32), method, control=False)
    assert all(
        row.form.support.startswith("unstructured/") and row.form.numbers[0].startswith("levels")
        for row in artifact.report.sites
    )
    assert artifact.report.final.bytes == sum(row.after.bytes for row in artifact.report.sites) + 4 * (32 + 2)
    kept = [int(artifact.model[place].weight.count_nonzero()) for place in (0, 2)]
    assert kept == [row.after.params for row in artifact.report.sites]
    assert sum(kept) <= 300
    shown = to_text(report_view(artifact.report, artifact.plan, 200), 200)
    assert all(
        f"{row.form.numbers[0]} {row.form.support}" in shown.split("Total")[-1]
        for row in artifact.report.sites
    )


STARTED = {
    "method": {"admm-nn": {"keep": 400, "prune": 2, "retrain": 0}},
    "settings": {"lr": 0.05},
    "seed": 1,
    "control": False,
}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"method": {"admm-nn": {"keep": 300, "prune": 2, "retrain": 0}}}, "method.keep=400, not 300"),
        ({"settings": {"lr": 0.1}}, "settings.lr=0.05, not 0.1"),
        ({"seed": 2}, "seed=1, not 2"),
        ({"pretrain": 1}, "pretrain=0, not 1"),
    ],
)
def test_a_run_goes_on_only_as_it_began(changed: dict[str, object], named: str, tmp_path: Path) -> None:
    first = tdpass.train(network(), Batches(X, Y, 32), folder=tmp_path, **STARTED)
    again = tdpass.train(network(), Batches(X, Y, 32), folder=tmp_path, resume=True, **STARTED)
    assert all(
        torch.equal(value, again.model.state_dict()[name]) for name, value in first.model.state_dict().items()
    )
    spelled = {
        **STARTED,
        "method": {"admm-nn": {"keep": 400, "prune": 2, "retrain": 0, "score": "magnitude"}},
    }
    tdpass.train(network(), Batches(X, Y, 32), folder=tmp_path, resume=True, **spelled)
    with pytest.raises(UsageError, match=named):
        tdpass.train(network(), Batches(X, Y, 32), folder=tmp_path, resume=True, **{**STARTED, **changed})


def _report(final: float, **others: float) -> Report:
    scores = {f"score_{name}": value for name, value in {**others, "final": final}.items()}
    size = StoredSize(1000, 10, 80, 10, 980, 61_000, 12_600_000)
    rows = [TrainingRow("method", 0, 1.0, 0.1, 1.0)]
    return Report(
        "net",
        original=Cost(1000, 1000, 4000),
        final=Cost(900, 900, 3600),
        training=rows,
        checks=scores,
        stored=size,
    )


def test_a_network_that_training_destroyed_is_said_first() -> None:
    broken = _report(10.0, control=49.0, dense=50.0)
    text, page = to_text(report_view(broken, None, 200), 200), render_html(broken)
    assert text.lstrip().startswith(
        "training destroyed this network: it scores 10.00, the dense network, trained as long 49.00"
    )
    assert 'role="alert"' in page
    assert report_view(broken, None, 200)[0].style == "bold red"
    for whole in (_report(48.0, control=49.0), _report(30.0, dense=49.0), _report(10.0)):
        assert "destroyed" not in to_text(report_view(whole, None, 200), 200)
        assert 'role="alert"' not in render_html(whole)


def test_training_notes_what_it_destroyed() -> None:
    scores = iter([50.0, 50.0, 10.0])
    method = {"admm-nn": {"keep": 40, "prune": 1, "retrain": 0}}
    artifact = tdpass.train(
        network(), Batches(X, Y, 32), method, control=False, test=lambda model: next(scores)
    )
    assert artifact.report.notes[0].startswith("training destroyed")


@pytest.mark.parametrize("kind", ["train", "loop"])
def test_a_projection_that_costs_much_is_said_however_it_was_trained(kind: str) -> None:
    method, data = AdmmTT(budget={"params": 0.6}, format="svd", rounds=1, rho=1e-6), Batches(X, Y, 32)
    if kind == "train":
        artifact = tdpass.train(network(), data, method, control=False)
    else:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        method.attach(model, optimizer, every=len(data))
        for inputs, targets in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        artifact = method.finish(model)
    assert sum("the last projection moves" in note for note in artifact.report.notes) == 1


def test_the_size_of_the_file_is_said_of_the_whole_file() -> None:
    text, page = to_text(report_view(_report(48.0), None, 200), 200), render_html(_report(48.0))
    assert "all tensors as stored: no smaller, 12.7 MB to 12.6 MB" in text
    assert "62×</strong>" not in page


class Recurrent(nn.Module):
    """An LSTM, attention and an embedding, of which only the head is a site as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.recurrent, self.attention = (
            nn.LSTM(8, 8, batch_first=True),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )
        self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.recurrent(self.table(tokens))
        x, _ = self.attention(x, x, x, need_weights=False)
        scores: Tensor = self.head(torch.relu(self.wide(x.mean(1))))
        return scores


@pytest.mark.parametrize("method", ["admm-nn", "admm-tt", "batude", "crossbar"])
def test_too_few_sites_are_told_with_what_opens_more(method: str) -> None:
    options = {"keep": 10**6} if method in {"admm-nn", "crossbar"} else {"budget": {"params": 0.01}}
    model = Recurrent()
    with pytest.raises((BudgetError, UsageError)) as told:
        make_method({method: options}).prepare(model, torch.zeros(2, 4, dtype=torch.long))
    assert "recurrent (the pass 'divide' opens it, before training tdpass.open_recurrent" in str(told.value)
    assert "tdpass.open_attention(model)" in str(told.value)


def test_a_network_with_an_embedding_is_adaptive_in_its_other_layers() -> None:
    model, tokens = Recurrent().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    narrow = ChannelAdaptive(widths=(0.5, 1.0)).prepare(model, tokens).eval()
    torch.testing.assert_close(narrow(tokens), model(tokens))
    tdpass.set_width(narrow, 0.5)
    torch.testing.assert_close(tdpass.ordinary(narrow, 0.5)(tokens), narrow(tokens))


def test_layers_whose_weights_are_computed_are_named_with_what_helps() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(24, 32)), nn.ReLU(), spectral_norm(nn.Linear(32, 2)))
    with pytest.raises(UsageError, match=r"0 \(.*remove_parametrizations.*2 \(.*remove_parametrizations"):
        AdmmTT(budget={"params": 0.5}).prepare(model, X)
