"""Recurrent layers of int8 or bfloat16 factors as cells in whole numbers, or on such weights.

The answers are the same as step by step.  Here is also when cells do not serve.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.fusing import choose
from tdpass.kernels import native
from tdpass.kernels.base import Op, use_reference
from tdpass.layers.float_chain import FloatChain
from tdpass.layers.fused import layer_by_layer
from tdpass.layers.integer_chain import IntegerChain
from tdpass.layers.recurrent import OpenRNN
from tdpass.layers.recurrent_encoded import float_cell
from tdpass.timings import TimingTable

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
FUSED = "fuse-kernels{measure=false}"
STEPS = f"factorize,quantize,quantize-activations{{calibration=dynamic}},{FUSED}"
HALVES = f"factorize,quantize{{numbers=bfloat16}},{FUSED}"
KINDS = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])


class Net(nn.Module):
    """Two directions of so many layers, batch first, answers alone."""

    def __init__(self, kind: type[nn.RNNBase], layers: int) -> None:
        super().__init__()
        self.rnn = kind(20, 32, num_layers=layers, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def made(kind: type[nn.RNNBase], steps: str = STEPS, layers: int = 2) -> tuple[nn.Module, OpenRNN, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 9, 20)
    net = tdpass.open_recurrent(Net(kind, layers).eval())
    plan = "plan{params=0.6}"
    model = tdpass.compress(net, None, x, pipeline=f"{plan},{steps}", formats=["svd"], effort="fast").model
    return model, model.rnn, x


def counted(rnn: OpenRNN, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions that run as cells, with the operator of each."""
    seen: list[str] = []
    run = rnn._by_encoded

    def watched(operator: Op, cell: object, x: Tensor, suffix: str, *rest: object) -> object:
        seen.append(f"{operator.name}{suffix}")
        return run(operator, cell, x, suffix, *rest)

    monkeypatch.setattr(rnn, "_by_encoded", watched)
    return seen


def cells_of(rnn: OpenRNN, end: str = "") -> list[str]:
    return [f"low_rank_{rnn.kind.__name__.lower()}{end}{suffix}" for suffix in rnn.suffixes]


@KINDS
@torch.no_grad()
def test_a_cell_in_whole_numbers_answers_as_its_layers_step_by_step(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rnn, x = made(kind)
    seen = counted(rnn, monkeypatch)
    found = model(x)
    assert seen == cells_of(rnn, "_int8")
    with layer_by_layer(model):
        plain = model(x)
    assert len(seen) == len(rnn.suffixes)
    assert float((found - plain).abs().max()) <= 2 / 127
    assert float((found - plain).abs().mean()) <= 0.1 / 127
    with use_reference():
        torch.testing.assert_close(found, model(x), rtol=0, atol=1.5e-2)
    hidden = rnn.get_submodule(f"hidden{rnn.suffixes[0]}")
    assert isinstance(hidden, IntegerChain)
    hidden.codes_and_scales()[-1].mul_(3)
    changed = model(x)
    assert not torch.allclose(changed, found, atol=1e-3)
    assert torch.equal(copy.deepcopy(model)(x), changed)


def test_where_gradients_are_wanted_or_a_layer_is_watched_it_runs_step_by_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rnn, x = made(nn.LSTM)
    seen = counted(rnn, monkeypatch)
    model(x.requires_grad_()).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    calls: list[int] = []
    rnn.get_submodule(f"hidden{rnn.suffixes[0]}").register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(x.detach())
    assert len(calls) == x.shape[1]
    assert not seen


@KINDS
@torch.no_grad()
def test_a_cell_on_halves_answers_as_its_layers_step_by_step(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rnn, x = made(kind, HALVES, layers=1)
    seen = counted(rnn, monkeypatch)
    found = model(x)
    assert seen == cells_of(rnn)
    with layer_by_layer(model):
        plain = model(x)
    assert len(seen) == len(rnn.suffixes)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    with use_reference():
        torch.testing.assert_close(found, model(x), rtol=0, atol=1e-5)
    hidden = rnn.get_submodule(f"hidden{rnn.suffixes[0]}")
    assert isinstance(hidden, FloatChain)
    assert {part.dtype for part in float_cell(hidden, rnn.gates)} == {torch.bfloat16}
    hidden.get_buffer(hidden.lowered.factors[-1]).mul_(3)
    assert not torch.allclose(model(x), found, atol=1e-3)


@pytest.mark.parametrize(("slower", "serves"), [("plain", True), ("factor_chain", False)])
@torch.no_grad()
def test_cells_on_halves_run_where_they_measured_faster(
    slower: str, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(calls: choose.Calls, threads: int) -> dict[str, float]:
        del threads
        return {way: 2e-6 if way == slower else 1e-6 for way in calls}

    monkeypatch.setattr(choose, "seconds_of", seconds)
    monkeypatch.setattr(choose, "times_kept", lambda: TimingTable(None))
    model, rnn, x = made(nn.LSTM, HALVES.replace("{measure=false}", ""), layers=1)
    seen = counted(rnn, monkeypatch)
    model(x)
    assert seen == (cells_of(rnn) if serves else [])
