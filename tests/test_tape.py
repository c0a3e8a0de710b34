"""Recording and replaying runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdpass.errors import UnsupportedError
from tdpass.tape import Tape, record


def _record(model: nn.Module, *inputs: Tensor) -> Tape:
    sites = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return record(lambda: model(*inputs), inputs, sites)


@pytest.mark.parametrize("name", ["residual", "odd"])
def test_a_replay_gives_what_the_model_gives(
    name: str, images: Tensor, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    tape = _record(model, images)
    with torch.no_grad():
        assert torch.equal(tape.play().finish(), model(images))
        assert torch.equal(tape.play().finish(), model(images)), (
            "a replay must not change what it is replayed on"
        )


def test_other_inputs_of_the_same_shape(residual: nn.Module, images: Tensor) -> None:
    tape = _record(residual, images)
    other = images.flip(0)
    (number,) = tape.inputs
    with torch.no_grad():
        assert torch.allclose(tape.play({number: other}).finish(), residual(other), atol=1e-6)


def test_a_fork_runs_the_rest_with_a_layer_replaced(residual: nn.Module, images: Tensor) -> None:
    tape = _record(residual, images)
    index = tape.site_calls["second"][0]
    with torch.no_grad():
        playback = tape.play().advance(index)
        forked = playback.fork({"second": lambda x: torch.zeros(48, 12, 10, 10)}).finish()
        residual.second.weight.zero_()
        residual.second.bias.zero_()
        assert torch.allclose(forked, residual(images), atol=1e-6)


def test_residual_sums_and_chains_are_found(
    residual: nn.Module, encoder: nn.Module, images: Tensor, tokens: Tensor
) -> None:
    tape = _record(residual, images)
    first, second = tape.site_calls["first"][0], tape.site_calls["second"][0]
    assert tape.residual_partner(second) is not None
    assert tape.residual_partner(first) is None
    assert tape.channelwise_consumer(first) == second
    assert tape.channelwise_consumer(tape.site_calls["stem"][0]) is None
    tape = _record(encoder, tokens)
    assert tape.residual_partner(tape.site_calls["down"][0]) is not None
    assert tape.channelwise_consumer(tape.site_calls["up"][0]) == tape.site_calls["down"][0]


def test_reused_layers_have_several_calls(odd: nn.Module, images: Tensor) -> None:
    tape = _record(odd, images)
    assert len(tape.site_calls["reused"]) == 2
    assert tape.batch_size == 48


def test_a_model_that_answers_otherwise_each_time_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="not deterministic"):
        _record(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), torch.randn(8, 3))


def test_in_place_writes_to_a_whole_value_are_replayed() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = torch.relu_(y)
            z[:, 0] = 7
            z += x
            return z

    model, x = Writes(), torch.randn(4, 3)
    tape = _record(model, x)
    assert torch.equal(tape.play().finish(), model(x))
    assert torch.equal(tape.play().finish(), model(x))
