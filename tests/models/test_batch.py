"""A call of a model, its samples along any axis."""

from __future__ import annotations

import pytest
import torch
from onnx_nets import network

from tdpass.errors import UsageError
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel

X, STATE, RATE = torch.randn(6, 16), torch.randn(2, 6, 4), torch.tensor(16000)


def test_samples_lie_along_the_axis_that_is_named_else_along_a_first_axis_that_is_shared() -> None:
    assert Batch((X,)).sample_axes == (0,)
    assert Batch((X, STATE, RATE)).sample_axes == (0, None, None)
    call = Batch((X, STATE), {"rate": RATE}, (0, 1, None))
    assert (call.size, call.divisible) == (6, True)
    assert (Batch((STATE,), axes=(1,)).size, Batch((RATE,)).size, Batch((X,), axes=(None,)).size) == (6, 1, 1)


def test_a_call_is_cut_and_repeated_along_its_axes_and_what_is_shared_stays() -> None:
    call = Batch((X, STATE), {"rate": RATE}, (0, 1, None))
    part = call.part(4, 9)
    assert torch.equal(part.args[0], X[4:])
    assert torch.equal(part.args[1], STATE[:, 4:])
    assert part.kwargs["rate"] is RATE
    grown = call.resized(8)
    assert grown.size == 8
    assert torch.equal(grown.args[0], torch.cat([X, X[:2]]))
    assert torch.equal(grown.args[1], torch.cat([STATE, STATE[:, :2]], 1))
    assert grown.resized(6).args[1].is_contiguous()


def test_a_call_without_such_an_axis_is_one_sample_and_is_never_cut() -> None:
    whole = Batch((X,), axes=(None,))
    assert torch.equal(whole.part(0, 1).args[0], X)
    assert torch.equal(whole.resized(1).args[0], X)
    with pytest.raises(UsageError, match="cannot be called with 4 samples"):
        whole.resized(4)
    fixed = Batch((X,), whole=True)
    assert (fixed.size, fixed.divisible, fixed.part(0, 2)) == (6, False, fixed)
    with pytest.raises(UsageError, match="6 at a time"):
        fixed.resized(4)


def test_a_tape_counts_per_sample_wherever_the_samples_lie() -> None:
    model = OnnxModel.open(network())
    images = torch.randn(4, 3, 8, 8)
    model.observe(Batch((images,)))
    per_sample = model.macs()
    model.observe(Batch((images,), axes=(None,)))
    assert model.macs() == 4 * per_sample > 0
