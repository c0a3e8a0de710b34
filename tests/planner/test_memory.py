"""Recorded runs stay within the memory they are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdpass
from tdpass.errors import UsageError
from tdpass.models import Batch, open_model
from tdpass.planner.memory import DEFAULT, Footprint, memory_limit, within_memory


def net() -> nn.Module:
    """Activations of 4 x 8, 4 x 8 and 4 x 2 numbers a sample, the last one flattened."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.AvgPool1d(4), nn.Flatten(), nn.Linear(8, 5)).eval()


def calls(*sizes: int) -> list[Batch]:
    """Calls of so many samples."""
    return [Batch((torch.randn(size, 3, 8),), axes=(0,)) for size in sizes]


def test_a_footprint_counts_what_a_backward_pass_keeps_and_what_waits_at_one_time() -> None:
    model = open_model(net())
    for size in (1, 4):
        found = Footprint.of(model.record(calls(size)[0]))
        assert found.total == 4 * (32 + 32 + 8 + 8 + 5)
        assert found.live == 4 * 32


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("", DEFAULT), ("512MiB", 2**29), ("4GiB", 2**32), ("1.5G", 3 * 2**29), ("1000", 1000)],
)
def test_the_limit_is_read_with_its_unit(text: str, bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDPASS_MEMORY", text)
    assert memory_limit() == bytes_


@pytest.mark.parametrize("text", ["much", "-4GiB", "0", "4 parsecs"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDPASS_MEMORY", text)
    with pytest.raises(UsageError, match=r"TDPASS_MEMORY=.* is not a size in memory"):
        memory_limit()


def test_calls_that_fit_stay_as_they_are() -> None:
    given = calls(64, 64, 7)
    kept, notes = within_memory(open_model(net()), given, DEFAULT)
    assert all(a is b for a, b in zip(kept, given, strict=True))
    assert notes == []


def test_calls_are_cut_to_what_a_backward_pass_can_keep_and_samples_to_what_can_wait() -> None:
    given, limit = calls(64, 64), 8 * 2 * 340 * 4  # a quarter of it holds two samples' 340 bytes eight times
    kept, notes = within_memory(open_model(net()), given, limit)
    assert [call.size for call in kept] == [8] * 7 + [
        7
    ]  # three quarters of it hold twice the 128 bytes of 63 samples
    assert torch.equal(torch.cat([call.tensors[0] for call in kept]), given[0].tensors[0][:63])
    assert notes[0].startswith("63 of 128 samples are used, at most 8 in a call")


def test_one_sample_is_left_however_little_there_is() -> None:
    kept, _ = within_memory(open_model(net()), calls(64, 64), 1)
    assert [call.size for call in kept] == [1]


def test_compressing_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDPASS_MEMORY", "20KiB")
    found = tdpass.make_plan(net(), {"params": 0.9}, torch.randn(128, 3, 8), effort="fast", cache=False)
    assert any("of 128 samples are used" in note and "TDPASS_MEMORY" in note for note in found.report.notes)
