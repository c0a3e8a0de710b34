"""Recurrent layers of low rank against torch's own with the same product as weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tdpass.errors import UnsupportedError, UsageError
from tdpass.models.low_rank_rnn import LowRankGRU, LowRankLSTM

PAIRS = [pytest.param(nn.LSTM, LowRankLSTM, id="lstm"), pytest.param(nn.GRU, LowRankGRU, id="gru")]


def flat(result: tuple) -> list[Tensor]:
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def of_low_rank(dense: nn.Module, rank: int) -> nn.Module:
    """The dense module with weights of that rank."""
    for name, weight in dense.named_parameters():
        if weight.dim() == 2:
            weight.data = torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1]) / rank**0.5 / weight.shape[1] ** 0.5
        assert name.startswith(("weight", "bias"))
    return dense


@pytest.mark.parametrize(("kind", "low"), PAIRS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_is_the_dense_layer_of_that_rank(kind: type, low: type, bidirectional: bool, batch_first: bool) -> None:
    dense = of_low_rank(kind(11, 17, 2, bias=batch_first, batch_first=batch_first, bidirectional=bidirectional), 5).eval()
    layer = low(dense, 5, 5).eval()
    x = torch.randn(3, 7, 11)
    wanted = flat(dense(x))
    fallback = flat(layer(x))
    with torch.no_grad():
        fused = flat(layer(x))
        again = flat(layer(x, layer(x)[1]))
        single = flat(layer(x[0]))
    for one, other, third in zip(wanted, fallback, fused, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(third, one, rtol=1e-4, atol=1e-5)
    for one, other in zip(again, flat(dense(x, dense(x)[1])), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(single, flat(dense(x[0])), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "low"), PAIRS)
def test_it_trains_and_the_fused_layer_follows(kind: type, low: type) -> None:
    layer = low(kind(4, 6), 3, 3)
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        before = layer(x)[0]
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.sub_(0.1 * parameter.grad)
        after = layer(x)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, layer(x)[0].detach(), rtol=1e-4, atol=1e-5)


def test_it_can_be_copied_and_its_state_loaded() -> None:
    layer, other = (LowRankLSTM(nn.LSTM(4, 6, 2), 3, 3) for _ in range(2))
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        wanted, _ = layer(x), other(x)
        other.load_state_dict(layer.state_dict())
        for twin in (other, copy.deepcopy(layer)):
            torch.testing.assert_close(twin(x)[0], wanted[0])


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="rank 9"):
        LowRankLSTM(nn.LSTM(8, 8), 9, 4)
    with pytest.raises(UsageError, match=r"nn\.GRU"):
        LowRankGRU(nn.LSTM(8, 8), 4, 4)
    with pytest.raises(UnsupportedError, match="proj_size"):
        LowRankLSTM(nn.LSTM(8, 8, proj_size=3), 4, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 8), torch.randn(2, 8)])
    with pytest.raises(UnsupportedError, match="PackedSequence"):
        LowRankGRU(nn.GRU(8, 8), 4, 4)(packed)
