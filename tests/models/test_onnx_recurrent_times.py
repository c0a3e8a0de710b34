"""Recurrent nodes whose steps have factors are timed beside what they were; slower ones are named."""

from __future__ import annotations

import pytest
import torch
from test_onnx_recurrent import AFTER, Case

import tdpass
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models.onnx.model import OnnxModel
from tdpass.models.onnx.rewriting import recurrent_times

CASES = {
    "LSTM": Case("LSTM"),
    "GRU-both-states": Case("GRU", direction="bidirectional", states=True, attributes=AFTER),
    "RNN-lengths": Case("RNN", lengths=True, bias=False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_callers_model_keeps_the_names_of_its_weights(name: str) -> None:
    case = CASES[name]
    given = case.proto()
    before, model = given.SerializeToString(), OnnxModel.open(given, case.batch())
    for site in model.sites():
        factors = FORMATS.get("svd").factorize(model.weight(site.name), site, (2,))
        model.replace(site.name, Layer(site, Form("svd", (2,)), factors, model.bias(site.name)))
    assert list(model.recurrent_times(case.batch()))
    assert given.SerializeToString() == before


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_only_nodes_that_stay_open_are_timed(name: str, hidden: bool) -> None:
    case = CASES[name]
    model = case.opened()
    for site in model.sites():
        if ("hidden" in site.name) is hidden:
            factors = FORMATS.get("svd").factorize(model.weight(site.name), site, (2,))
            model.replace(site.name, Layer(site, Form("svd", (2,)), factors, model.bias(site.name)))
    found = list(model.recurrent_times(case.batch()))
    assert [name for name, _, _ in found] == (["rnn"] if hidden else [])
    assert all(dense > 0 and now > 0 for _, dense, now in found)


def test_the_node_that_it_is_compared_with_is_the_one_that_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ran = CASES["GRU-both-states"], list[torch.Tensor]()

    def answers(calls: dict[str, object], threads: int) -> dict[str, float]:
        return dict.fromkeys(calls, float(threads))

    class Recorded(recurrent_times.Session):
        def bound(self, inputs: dict[str, torch.Tensor]) -> object:  # type: ignore[override]
            ran.append(next(iter(self(inputs).values())))
            return super().bound(inputs)

    monkeypatch.setattr(recurrent_times, "seconds_of", answers)
    monkeypatch.setattr(recurrent_times, "Session", Recorded)
    model = case.opened()
    exact = model.run(case.batch())["y"]
    for site in model.sites():
        rank = (min(model.weight(site.name).shape),)
        factors = FORMATS.get("svd").factorize(model.weight(site.name), site, rank)
        model.replace(site.name, Layer(site, Form("svd", rank), factors, model.bias(site.name)))
    assert list(model.recurrent_times(case.batch())) == [("rnn", 1.0, 1.0)]
    assert len(ran) == 2
    for answer in ran:
        assert torch.allclose(answer, exact, atol=1e-5)


@pytest.mark.parametrize(("seconds", "said"), [(2.0, True), (0.5, False)])
def test_what_is_slower_is_noted(seconds: float, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(calls: dict[str, object], threads: int) -> dict[str, float]:
        return {"dense": 1.0, "now": seconds}

    monkeypatch.setattr(recurrent_times, "seconds_of", times)
    case = CASES["LSTM"]
    data = torch.randn(8, 4, 7, generator=torch.Generator().manual_seed(0))
    inputs = case.batch().kwargs["x"].shape[2]
    made = tdpass.compress(
        case.proto(),
        None,
        {"x": data[..., :inputs]},
        pipeline="plan{params=0.6},factorize",
        formats=["svd"],
        cache=False,
    )
    notes = [note for row in made.report.passes for note in row.notes]
    assert any("'rnn' takes 2.00 times as long with factors in its steps" in note for note in notes) is said
