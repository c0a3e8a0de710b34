"""Runs that leave torch on the way.

What is recorded of them must still do what the model does with another layer in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.divergence import Divergence, FittedDivergence
from tdpass.planner.joint import JOINT_CHANGES
from tdpass.planner.lockstep import Lockstep
from tdpass.planner.moments import stream_metrics
from tdpass.planner.repair import correct_biases, divergence_of
from tdpass.planner.sensitivity import Sweep
from tdpass.tape import LiveTape, Tape
from tdpass.verbs import compress


def _sigmoid_product(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # deprecated, and in many a trained model
    _swish = torch.jit.script(_sigmoid_product)
    _SCRIPTED = torch.jit.script(nn.Sequential(nn.SiLU()))
    _TRACED = torch.jit.trace(_sigmoid_product, torch.ones(2, 3))


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * (s + x * s * (1 - s))


@dataclass
class _Answer:
    scores: Tensor
    names: tuple[str, ...] = ("a",)


def _through_numpy(x: Tensor) -> Tensor:
    a = x.detach().numpy()
    return torch.from_numpy(a / (1 + 2.718281828**-a))


def _through_a_view(x: Tensor) -> Tensor:
    y = x * x.sigmoid()
    y[:, 0].add_(1.0)
    return y


def _scaled(x: Tensor) -> Tensor:
    return x / float(x.square().mean()) * x.sigmoid()


def _mixed(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ torch.eye(x.shape[1])).float() * x.sigmoid()


def _into(x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    torch.mul(x, x.sigmoid(), out=made)
    return made


class _OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no derivative")


def _irreversible(x: Tensor) -> Tensor:
    made = _through_numpy(x)
    torch.add(x, 0.0, out=torch.empty_like(x))
    return made


_CUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "plain": (lambda x: x * x.sigmoid(), False),
    "script": (_swish, False),
    "script module": (_SCRIPTED, False),
    "traced": (_TRACED, False),
    "autograd function": (_Swish.apply, False),
    "vmap": (torch.vmap(lambda row: row * row.sigmoid()), False),
    "numpy": (_through_numpy, True),
    "tolist": (lambda x: torch.tensor((x * x.sigmoid()).tolist()), True),
    "dlpack": (lambda x: torch.utils.dlpack.from_dlpack((x * x.sigmoid()).detach()), True),
    "number": (_scaled, True),
    "view": (_through_a_view, True),
    "autocast": (_mixed, False),
    "out": (_into, False),
    "seeded": (lambda x: (torch.manual_seed(0), x * x.sigmoid() + 0.1 * torch.randn(x.shape))[1], True),
}


class _Net(nn.Module):
    """Two layers with an activation between them that may leave torch; `pack` makes what is returned."""

    def __init__(
        self, act: Callable[[Tensor], Tensor], pack: Callable[[Tensor], object] = lambda y: y
    ) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 5)
        self.act, self.pack = act, pack

    def forward(self, x: Tensor) -> object:
        return self.pack(self.second(self.act(self.first(x))))


def _net(act: Callable[[Tensor], Tensor], pack: Callable[[Tensor], object] = lambda y: y) -> _Net:
    torch.manual_seed(4)
    net = _Net(act, pack).eval()
    with torch.no_grad():
        net.first.weight.mul_(3)
        net.second.weight.mul_(3)
    return net


X = torch.randn(64, 12, generator=torch.Generator().manual_seed(5))


def _layers(net: _Net, *names: str) -> dict[str, Layer]:
    model = open_model(net, Batch((X,)))
    svd = FORMATS.get("svd")
    sites = {site.name: site for site in model.sites()}
    made = {name: svd.factorize(model.weight(name), sites[name], (2,)) for name in names}
    return {
        name: Layer(sites[name], Form("svd", (2,)), factors, model.bias(name)).to(torch.float32)
        for name, factors in made.items()
    }


def _fitted(tapes: list[Tape]) -> FittedDivergence:
    divergence = Divergence("mse")
    with torch.no_grad():
        return divergence.fit([divergence.outputs(tape.play().finish()) for tape in tapes])


@pytest.mark.parametrize("cut", _CUTS)
@pytest.mark.parametrize("site", ["first", "second"])
def test_a_replacement_on_the_tape_does_what_it_does_in_the_model(cut: str, site: str) -> None:
    net = _net(_CUTS[cut][0])
    tape = open_model(net).record(Batch((X,)))
    assert isinstance(tape, LiveTape) == _CUTS[cut][1]
    assert (tape.note != "") == _CUTS[cut][1]
    layer = _layers(net, site)[site]
    with torch.no_grad():
        replayed = tape.play().advance(tape.site_calls[site][0]).fork({site: layer}).finish()
        net.get_submodule(site).weight.copy_(layer.reconstruct())  # type: ignore[union-attr]
        torch.testing.assert_close(replayed, net(X), atol=2e-2 if cut == "autocast" else 1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("pack", "live"),
    [(_Answer, False), (lambda y: [_Answer(y)], False), (lambda y: SimpleNamespace(scores=y), True)],
)
def test_outputs_in_objects_follow_the_layers(pack: Callable[[Tensor], object], live: bool) -> None:
    net = _net(torch.relu, pack)
    tape = open_model(net).record(Batch((X,)))
    assert isinstance(tape, LiveTape) == live
    layer = _layers(_net(torch.relu), "first")["first"]
    with torch.no_grad():
        answer = tape.play().fork({"first": layer}).finish()
        net.first.weight.copy_(layer.reconstruct())
        expected: Any = net(X)
    answer, expected = (value[0] if isinstance(value, list) else value for value in (answer, expected))
    torch.testing.assert_close(answer.scores, expected.scores, atol=1e-4, rtol=1e-4)


def test_a_run_that_leaves_torch_is_planned_and_repaired_as_one_that_does_not() -> None:
    plain, cut = (
        [open_model(_net(act)).record(Batch((part,))) for part in X.split(40)]
        for act in (lambda x: x * x.sigmoid(), _through_numpy)
    )
    assert all(isinstance(tape, LiveTape) for tape in cut)
    net, measure = _net(_through_numpy), _fitted(plain)
    layers, sites = (
        _layers(net, "first", "second"),
        {site.name: site for site in open_model(net, Batch((X,))).sites()},
    )
    losses = [
        [Sweep(tapes, measure, 64).loss({name: layer}) for name, layer in layers.items()]
        for tapes in (plain, cut)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert min(losses[1]) > 1e-3
    for (_, ours), (_, theirs) in zip(
        stream_metrics(cut, list(sites.values()), measure),
        stream_metrics(plain, list(sites.values()), measure),
        strict=True,
    ):
        torch.testing.assert_close(ours.inputs, theirs.inputs)
    corrected = [correct_biases(tapes, layers, layers) for tapes in (plain, cut)]
    for name in layers:
        torch.testing.assert_close(corrected[1][name].bias, corrected[0][name].bias, atol=1e-5, rtol=1e-4)
    assert divergence_of(cut, corrected[1], measure) < divergence_of(cut, layers, measure)
    assert all(change.find(cut, sites) == [] for change in JOINT_CHANGES)
    assert Lockstep(cut).called_once() == ["first", "second"]


def test_gradients_pass_through_scripted_code() -> None:
    tapes = [[open_model(_net(act)).record(Batch((X,)))] for act in (lambda x: x * torch.sigmoid(x), _swish)]
    sites = open_model(_net(_swish), Batch((X,))).sites()
    plain, scripted = (dict(stream_metrics(each, sites, _fitted(each))) for each in tapes)
    for ours, theirs in zip(scripted.values(), plain.values(), strict=True):
        torch.testing.assert_close(ours.outputs, theirs.outputs)


@pytest.mark.parametrize("act", [_OneWay.apply, _irreversible], ids=["backward", "forward"])
def test_inputs_are_observed_where_there_is_no_derivative(act: Callable[[Tensor], Tensor]) -> None:
    tapes = [
        [open_model(_net(act)).record(Batch((part,))) for part in X.split(40)]
        for act in (lambda x: x * x.sigmoid(), act)
    ]
    sites = open_model(_net(act), Batch((X,))).sites()
    plain, cut = (dict(stream_metrics(each, sites, _fitted(each))) for each in tapes)
    for ours, theirs in zip(cut.values(), plain.values(), strict=True):
        torch.testing.assert_close(ours.inputs, theirs.inputs)
        torch.testing.assert_close(ours.mean, theirs.mean)


def test_a_live_tape_plays_the_model_as_it_was_recorded() -> None:
    net = _net(_through_numpy)
    model = open_model(net)
    tape, expected = model.record(Batch((X,))), net(X).detach()
    for name, layer in _layers(net, "first", "second").items():
        model.replace(name, layer)
    with torch.no_grad():
        torch.testing.assert_close(tape.play().finish(), expected)


@pytest.mark.parametrize("cut", ["script", "numpy", "number", "vmap", "autocast"])
def test_the_expected_loss_is_what_is_measured(cut: str) -> None:
    made = compress(
        _net(_CUTS[cut][0]),
        {"params": 0.75},
        X,
        cache=False,
        formats=["svd"],
        pipeline="plan,factorize,verify",
    )
    assert made.plan is not None
    assert 0.5 < made.plan.loss / made.report.checks["divergence"] < 2
    assert any("running the whole model" in note for note in made.report.notes) == _CUTS[cut][1]
