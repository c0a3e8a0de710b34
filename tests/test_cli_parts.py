"""What the verbs are made of: option values, progress bars, timing."""

from __future__ import annotations

import argparse
import io

import pytest
import torch

from tdpass.cli.bench import compared
from tdpass.cli.output import finite
from tdpass.cli.runners import Runner
from tdpass.cli.timing import Quartiles
from tdpass.cli.values import budget, inputs, limit, shape
from tdpass.clock import interleaved
from tdpass.progress import ProgressBars


def test_budget_pairs_keep_their_text() -> None:
    assert budget([limit("macs=0.4"), limit(" bytes = 2MiB ")]) == {"macs": "0.4", "bytes": "2MiB"}


def test_inputs_are_repeatable_and_typed() -> None:
    tensors = inputs([shape("2x3"), shape("1x4:int64")])
    assert tensors is not None
    assert [(tuple(t.shape), t.dtype) for t in tensors] == [((2, 3), torch.float32), ((1, 4), torch.int64)]
    assert torch.equal(tensors[0], inputs([shape("2x3")])[0])
    assert inputs([]) is None
    with pytest.raises(argparse.ArgumentTypeError, match="empty axis"):
        shape("0x3")


def test_numbers_that_json_lacks_become_null() -> None:
    assert finite({"a": [float("nan"), 1.0], "b": (float("inf"),)}) == {"a": [None, 1.0], "b": [None]}


def test_bars_appear_only_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tdpass.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with ProgressBars(stream, shown=True) as progress:
        progress("fit", 0, 4)
        now[0] = 1.9
        progress("fit", 1, 4)
        assert not progress._tasks
        now[0] = 2.1
        progress("fit", 2, 4)
        assert list(progress._tasks) == ["fit"]
        progress.clear()  # for a line of text
        assert not progress._tasks
        progress("fit", 3, 4)
        assert list(progress._tasks) == ["fit"]
        progress("fit", 4, 4)
        assert not progress._tasks
        progress("fit", 0, 4)
        assert not progress._tasks


def test_bars_never_appear_where_nobody_looks() -> None:
    stream = io.StringIO()
    with ProgressBars(stream, shown=False) as progress:
        for done in range(3):
            progress("fit", done, 3)
    assert stream.getvalue() == ""


def test_timing_is_interleaved_and_repeats_short_calls() -> None:
    calls = [0, 0]

    def count(index: int) -> None:
        calls[index] += 1

    seconds = interleaved([lambda: count(0), lambda: count(1)], 3, lambda what, done, of: None)
    assert [len(times) for times in seconds] == [3, 3]
    assert min(calls) > 30


def test_ratios_are_taken_round_by_round() -> None:
    candidates = [
        Runner("a", "ort", int),
        Runner("a", "vino", int),
        Runner("b", "ort", int),
        Runner("b", "eager", int),
    ]
    rows = compared(candidates, [[4.0, 8.0], [2.0, 4.0], [1.0, 2.0], [1.0, 1.0]])
    assert rows[2].faster == Quartiles(4.0, 4.0, 4.0)
    assert rows[2].faster_than_best == Quartiles(2.0, 2.0, 2.0)
    assert rows[3].faster is None
