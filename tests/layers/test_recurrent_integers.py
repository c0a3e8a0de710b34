"""Recurrent layers of int8 factors as cells in whole numbers.

The answers are the same as step by step.  Here is also when cells do not serve.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.kernels import native
from tdpass.kernels.base import use_reference
from tdpass.layers.fused import layer_by_layer
from tdpass.layers.integer_chain import IntegerChain
from tdpass.layers.recurrent import OpenRNN

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
STEPS = "factorize,quantize,quantize-activations{calibration=dynamic},fuse-kernels{measure=false}"


class Net(nn.Module):
    """Two directions of two layers, batch first, answers alone."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(20, 32, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def made(kind: type[nn.RNNBase]) -> tuple[nn.Module, OpenRNN, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 9, 20)
    net = tdpass.open_recurrent(Net(kind).eval())
    plan = "plan{params=0.6}"
    model = tdpass.compress(net, None, x, pipeline=f"{plan},{STEPS}", formats=["svd"], effort="fast").model
    return model, model.rnn, x


def counted(rnn: OpenRNN, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions that run as cells in whole numbers."""
    seen: list[str] = []
    run = rnn._by_integers

    def by_integers(x: Tensor, suffix: str, *rest: object) -> object:
        seen.append(suffix)
        return run(x, suffix, *rest)

    monkeypatch.setattr(rnn, "_by_integers", by_integers)
    return seen


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@torch.no_grad()
def test_a_cell_in_whole_numbers_answers_as_its_layers_step_by_step(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rnn, x = made(kind)
    seen = counted(rnn, monkeypatch)
    found = model(x)
    assert seen == list(rnn.suffixes)
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
