"""Layers in branches, loop bodies and local functions: they are sites like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_bodies as made
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from onnx_nets import svd as linear_svd
from torch import Tensor

import tdpass
from tdpass.errors import InvalidModelError
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models.base import Batch
from tdpass.models.extents import UNREACHED
from tdpass.models.onnx.model import OnnxModel

Inputs = dict[str, np.ndarray]


def x(*shape: int, shift: float = 0.0) -> np.ndarray:
    return made.weights(*shape, seed=9) + np.float32(shift)


@dataclass(frozen=True)
class Case:
    """A model, what it is fed, and how often each of its sites is called by that."""

    build: Callable[[], ModelProto]
    feed: Inputs
    calls: dict[str, int]
    unreached: tuple[str, ...] = ()

    def batch(self) -> Batch:
        tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in self.feed.items()}
        return Batch((), tensors)


def svd(model: OnnxModel, name: str, rank: int) -> Layer:
    """The site in two layers of that rank."""
    site = next(site for site in model.sites() if site.name == name)
    if not site.axes:
        return linear_svd(model, name, rank)
    factors = FORMATS.get("channel_svd").factorize(model.weight(name), site, (rank,))
    return Layer(site, Form("channel_svd", (rank,)), factors, model.bias(name))


RATE = {"x": x(4, 3, 6, 6), "rate": np.array(16000)}
CASES = {
    "own_weights": Case(lambda: made.branches(own=True), {"x": x(4, 8, shift=1)}, {"a": 1}, ("b",)),
    "outer_weights": Case(lambda: made.branches(own=False), {"x": x(4, 8, shift=-1)}, {"b": 1}, ("a",)),
    "all_inside": Case(made.all_inside, RATE, {"conv": 1, "fc": 1}),
    "loop": Case(made.loop, {"x": x(4, 8)}, {"cell": 3}),
    "scan": Case(made.scan, {"x": x(2, 5, 8)}, {"own": 5, "input": 5}),
    "scan_reverse": Case(lambda: made.scan(reverse=True), {"x": x(2, 5, 8)}, {"own": 5, "input": 5}),
    "nested": Case(made.nested, {"x": x(4, 8)}, {"deep": 1}),
    "functions": Case(made.functions, {"x": x(4, 8)}, {"one": 1, "two": 1}),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(proto: ModelProto, feed: Inputs) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


@each
def test_every_call_in_a_body_is_recorded_and_replayed(case: Case) -> None:
    model = OnnxModel.open(case.build(), case.batch())
    tape = model.record(case.batch())
    assert {name: len(tape.site_calls[name]) for name in case.calls} == case.calls
    wanted = run(case.build(), case.feed)
    for ours, theirs in zip(tape.play().finish().values(), wanted, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-5)
    assert {name: model.declined()[name] for name in case.unreached} == dict.fromkeys(
        case.unreached, UNREACHED
    )


@each
def test_full_rank_in_place_changes_no_answer(case: Case) -> None:
    proto = case.build()
    model = OnnxModel.open(proto, case.batch())
    for site in model.sites():
        model.replace(site.name, svd(model, site.name, min(site.o, site.weights // site.o)))
    model.check()
    small = model.unwrap()
    for ours, theirs in zip(run(small, case.feed), run(proto, case.feed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@each
def test_a_replaced_layer_leaves_no_dense_weight_and_is_what_the_tape_plays(case: Case) -> None:
    model = OnnxModel.open(case.build(), case.batch())
    name = next(iter(case.calls))
    dense = model.weight(name).numel()
    before = model.params()
    model.replace(name, svd(model, name, 1))
    site = next(site for site in model.sites() if site.name == name)
    assert model.params() == before - dense + sum(site.shape[:2]) * (site.axes == 0) + (
        site.o + site.weights // site.o
    ) * (site.axes > 0)
    played = model.record(case.batch()).play().finish()
    for ours, theirs in zip(played.values(), run(model.unwrap(), case.feed), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-5)


def test_a_layer_of_a_loop_counts_as_often_as_it_runs() -> None:
    feed = Batch((torch.from_numpy(x(4, 8)),))
    counts = []
    for rounds in (2, 5):
        model = OnnxModel.open(made.loop(rounds), feed)
        (site,) = model.sites()
        assert site.out_positions == rounds
        counts.append(model.macs())
    assert counts == [2 * 64, 5 * 64]


@pytest.mark.parametrize("name", ["all_inside", "scan", "functions"])
def test_compress_meets_its_budget_in_bodies(name: str) -> None:
    case = CASES[name]
    feed = {key: torch.from_numpy(np.asarray(array)) for key, array in case.feed.items()}
    if name == "scan":
        feed = {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}
    result = tdpass.compress(case.build(), {"params": 0.8}, feed, effort="fast", progress=False)
    assert result.report.final.params <= 0.8 * result.report.original.params
    assert run(result.model, case.feed)[0].shape == run(case.build(), case.feed)[0].shape


def test_a_batchnorm_in_a_branch_is_folded() -> None:
    case = CASES["all_inside"]
    model = OnnxModel.open(case.build(), case.batch())
    assert model.fold_batchnorm() == ["conv"]
    kinds = {
        node.op_type for g in (a.g for n in model.unwrap().graph.node for a in n.attribute) for node in g.node
    }
    assert "BatchNormalization" not in kinds
    (ours,), (theirs,) = run(model.unwrap(), case.feed), run(case.build(), case.feed)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_loop_that_does_not_end_is_left_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDPASS_LOOP_SECONDS", "0.2")
    model = OnnxModel.open(made.loop(10**7))
    with pytest.raises(InvalidModelError, match=r"did not end within 0\.2 seconds"):
        model.record(Batch((torch.zeros(2, 8),)))


def test_moments_of_a_body_are_those_of_all_its_rounds() -> None:
    """What the layer of a scan reads over a sequence is what it would read step by step."""
    case = CASES["scan"]
    model = OnnxModel.open(case.build(), case.batch())
    tape = model.record(case.batch())
    seen: list[Tensor] = []

    def watch(name: str, read: Tensor, y: Tensor) -> Tensor:
        if name == "input":
            seen.append(read)
        return y

    tape.play().finish(watch)
    torch.testing.assert_close(torch.stack(seen, 1), torch.from_numpy(case.feed["x"]))
