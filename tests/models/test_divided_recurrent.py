"""Recurrent layers and cells of torch are sites without asking.

The pass `divide` opens them, and closes them where that does not pay.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tdpass
from tdpass.layers.recurrent import OpenRNN
from tdpass.layers.recurrent_cells import OpenCell
from tdpass.models import open_model
from tdpass.models.base import Batch

X = torch.randn(12, 4, 10, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        answered = layer.proj_size or layer.hidden_size
        self.layer, self.head = layer, nn.Linear(answered * (1 + layer.bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.flatten_parameters()
        return self.head(self.layer(x)[0][:, -1])


class Stepper(nn.Module):
    """A cell over the steps, and a head."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Padded(Reader):
    """A layer that is given a packed sequence."""

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.full((len(x),), 3), batch_first=True)
        return self.head(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0][:, -1])


NETS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Reader(nn.LSTM(10, 16, batch_first=True, bidirectional=True)),
    "lstm_projected": lambda: Reader(nn.LSTM(10, 16, batch_first=True, proj_size=6)),
    "gru": lambda: Reader(nn.GRU(10, 16, 2, batch_first=True)),
    "rnn": lambda: Reader(nn.RNN(10, 16, batch_first=True, nonlinearity="relu")),
    "lstm_cell": lambda: Stepper(nn.LSTMCell(10, 16)),
    "gru_cell": lambda: Stepper(nn.GRUCell(10, 16, bias=False)),
    "rnn_cell": lambda: Stepper(nn.RNNCell(10, 16)),
}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
each = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@each
def test_it_is_compressed_saved_and_loaded_on_the_class_it_had(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    net = seeded(make)
    keys = list(net.state_dict())
    small = tdpass.compress(
        net, {"params": 0.6}, X, effort="fast", progress=False, pipeline="divide,plan,factorize"
    )
    assert small.report.final.params <= 0.6 * sum(tensor.numel() for tensor in net.parameters())
    assert any(not choice.kept_dense and "head" not in choice.site for choice in small.plan)
    assert list(net.state_dict()) == keys
    opened = [part for part in small.model.modules() if isinstance(part, OpenRNN | OpenCell)]
    assert [hasattr(part, "_flat_weights") for part in opened] == [False]
    small.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", make().eval())
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), small.model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights")  # of flatten_parameters
@pytest.mark.parametrize("name", ["lstm_projected", "gru", "lstm_cell"])
def test_an_exported_program_is_compressed_and_what_it_is_saved_as_answers_the_same(
    name: str, tmp_path: Path
) -> None:
    given = X[:, :2]
    program = torch.export.export(seeded(NETS[name]), (given,))
    small = tdpass.compress(
        program, {"params": 0.6}, given, effort="fast", progress=False, pipeline="divide,plan,factorize"
    )
    assert small.report.final.params <= 0.6 * small.report.original.params
    assert any(not choice.kept_dense and "head" not in choice.site for choice in small.plan)
    small.save(tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2")
    assert isinstance(small.model, torch.export.ExportedProgram)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module()(given), small.model.module()(given), rtol=1e-4, atol=1e-5)


@each
def test_opened_and_joined_again_it_is_what_it_was(make: Callable[[], nn.Module]) -> None:
    net = seeded(make)
    with torch.no_grad():
        before = net(X)
    model = open_model(net, Batch((X,)))
    assert len(model.divide()) == 1
    with torch.no_grad():
        torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-5)
    assert len([site for site in model.sites() if "input" in site.name or "hidden" in site.name]) >= 2
    assert model.join() == ["layer" if isinstance(net, Reader) else "cell"]
    fresh = seeded(make)
    assert [type(part) for part in net.modules()] == [type(part) for part in fresh.modules()]
    assert list(net.state_dict()) == list(fresh.state_dict())
    with torch.no_grad():
        assert torch.equal(net(X), before)


@pytest.mark.parametrize("state", [None, "given"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "cell", [nn.LSTMCell(10, 16), nn.GRUCell(10, 16), nn.RNNCell(10, 16, nonlinearity="relu")]
)
def test_an_open_cell_takes_and_returns_what_the_dense_one_does(
    cell: nn.RNNCellBase, alone: bool, state: str | None
) -> None:
    x = X[0, 0] if alone else X[:, 0]
    held = torch.randn(*x.shape[:-1], 16, generator=torch.Generator().manual_seed(1))
    given: Any = None if state is None else (held, 2 * held) if isinstance(cell, nn.LSTMCell) else held
    with torch.no_grad():
        ours, theirs = OpenCell(cell)(x, given), cell(x, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_given_packed_sequences_stays_with_the_reason() -> None:
    net = seeded(lambda: Padded(nn.LSTM(10, 16, batch_first=True)))
    with torch.no_grad():
        before = net(X)
    model = open_model(net, Batch((X,)))
    reasons: dict[str, str] = {}
    assert model.divide(reasons.__setitem__) == []
    assert "layer" in reasons
    assert type(net.layer) is nn.LSTM
    with torch.no_grad():
        assert torch.equal(net(X), before)
