"""`torch.compile(..., backend="tdpass", options={"freeze": True})`.

Weights are constants, and single layers operators.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from tdpass.dynamo import fuse
from tdpass.dynamo.backend import Options
from tdpass.dynamo.frozen import _RUNNERS
from tdpass.errors import UsageError
from tdpass.fusing.choose import Verdict
from tdpass.fusing.spec import ChainCall, ChainSpec
from tdpass.fusing.torch_calls import convolutions, in_torch

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lru_cache.*"),
]


class Snapshot:
    """An inner compiler that copies constants as inductor does, and counts what it was given."""

    def __init__(self) -> None:
        self.constants: list[int] = []
        self.inputs: list[int] = []
        self.operators: list[int] = []

    def __call__(self, module: Any, examples: Any) -> Callable[..., Any]:
        self.constants.append(len(list(module.buffers())))
        self.inputs.append(len(examples))
        self.operators.append(sum(str(node.target).startswith("tdpass.") for node in module.graph.nodes))
        return copy.deepcopy(module).forward  # type: ignore[no-any-return]


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    snapshot = Snapshot()
    monkeypatch.setitem(tdpass.dynamo.backend._INNER, "eager", snapshot)
    return snapshot


class Net(nn.Module):
    """A dense convolution, a low-rank one, and a dense head with a buffer.

    The low-rank one has a batch-norm and a residual sum.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first, self.last = nn.Conv2d(width, 4, 1, bias=False), nn.Conv2d(4, width, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 10)
        self.norm.running_mean.normal_(0, 0.3)
        self.register_buffer("scale", torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.last(self.first(x))) + x)
        return self.head(x.mean((2, 3))) * self.scale


@pytest.fixture
def net() -> Net:
    return Net().eval()


def frozen(model: nn.Module, **options: Any) -> Any:
    return torch.compile(
        model, backend="tdpass", options={"inner": "eager", "measure": False, "freeze": True, **options}
    )


def close(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a, b, atol=2e-5 * float(b.abs().max()), rtol=0)
    )


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 9, 7)


@torch.no_grad()
def test_weights_are_constants_of_the_graph(net: Net, inner: Snapshot) -> None:
    x, run = images(), frozen(net)
    assert close(run(x), net(x))
    assert close(run(x), net(x))
    assert (inner.inputs, inner.operators) == ([2], [1])  # the image and the buffer, which may change
    assert inner.constants == [7]  # stem, head, and the packed chain: two weights and a bias


@torch.no_grad()
def test_edits_are_seen_after_invalidate_and_replaced_weights_at_once(net: Net, inner: Snapshot) -> None:
    x, run, other = images(), frozen(net), Net().eval()
    before = run(x)
    net.stem.weight.mul_(2)
    net.last.weight.mul_(-1)
    assert torch.equal(run(x), before)
    tdpass.invalidate(Net())
    assert torch.equal(run(x), before)
    tdpass.invalidate(net)
    assert close(run(x), net(x))
    net.load_state_dict(other.state_dict())
    tdpass.invalidate()
    assert close(run(x), net(x))
    net.head.weight = nn.Parameter(torch.randn_like(net.head.weight))
    assert close(run(x), net(x))
    net.scale.mul_(3)
    assert close(run(x), net(x))
    assert len(inner.inputs) == 4
    net.head.weight = nn.Parameter(torch.randn(10, 16, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"torch.compiler.reset"):
        run(x)


@torch.no_grad()
def test_every_instance_has_a_graph_of_its_own(inner: Snapshot) -> None:
    nets, x = [Net().eval() for _ in range(3)], images()
    runs = [frozen(each) for each in nets]
    for _ in range(2):
        for each, run in zip(nets, runs, strict=True):
            assert close(run(x), each(x))
    assert len(inner.inputs) == 3

    def called(model: nn.Module, x: Tensor) -> Tensor:
        return torch.sin(model(x))  # type: ignore[no-any-return]

    run = frozen(called)  # type: ignore[arg-type]
    for each in (*nets, *nets):
        assert close(run(each, x), called(each, x))


@torch.no_grad()
def test_instances_are_told_apart_without_the_check_of_the_module(
    inner: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdpass.dynamo.frozen.loosen_guards", lambda graph, weights: 0)
    nets, x = [Net().eval() for _ in range(2)], images()
    for each in (*nets, *nets):
        assert close(frozen(each)(x), each(x))


@torch.no_grad()
def test_what_may_change_is_still_checked(inner: Snapshot) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(8, 3, bias=False), nn.Linear(3, 8), nn.BatchNorm1d(8)
            self._calls, self.power = 0, 1
            self.register_buffer("state", torch.zeros(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            self._calls += 1
            self.state = self.state[:1] + self.norm(self.b(self.a(x))) * self._calls**self.power
            return self.state

    torch.manual_seed(0)
    model = Counting().eval()
    twin = copy.deepcopy(model)
    run, x = frozen(model), torch.randn(2, 8)
    for step in range(4):
        model.power = twin.power = step // 2 + 1
        assert close(run(x), twin(x))
    for module in (model, twin):
        module.train()
    assert close(run(x), twin(x))
    assert torch.allclose(model.norm.running_mean, twin.norm.running_mean)


@torch.no_grad()
def test_few_checks_are_left(net: Net, inner: Snapshot) -> None:
    left: list[str] = []

    def count(guards: Any) -> list[bool]:
        left[:] = [guard.name for guard in guards]
        return [True] * len(left)

    frozen(net, guard_filter_fn=count)(images())
    assert sum("self" in name for name in left) < 10
    assert any("scale" in name for name in left)
    assert any("training" in name for name in left)


@torch.no_grad()
def test_dynamic_batches_and_invalidation_of_them(
    net: Net, inner: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    run = frozen(net)
    for size in (2, 3, 6, 5, 9, 1):
        x = images(size)
        assert close(run(x), net(x))
    compilations = len(inner.inputs)
    assert compilations <= 4
    net.head.bias.add_(1)
    tdpass.invalidate(net)
    for size in (3, 6, 7, 8):
        x = images(size)
        assert close(run(x), net(x))
    assert len(inner.inputs) <= 2 * compilations
    net.head.bias = nn.Parameter(net.head.bias + 1)
    with caplog.at_level(logging.WARNING, "tdpass.backend"):
        for size in (3, 6, 1):
            x = images(size)
            assert close(run(x), net(x))
    assert any("dynamic sizes" in record.getMessage() for record in caplog.records)


@torch.no_grad()
def test_tied_weights_breaks_and_writes_to_weights(inner: Snapshot) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 3, bias=False), nn.Linear(3, 8), nn.Linear(3, 8)
            self.c.weight = self.b.weight
            self.moved = nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            torch._dynamo.graph_break()
            self.moved.add_(1)
            return self.c(self.a(torch.relu(x))) + self.moved

    model, x = Broken(), torch.randn(3, 8)
    twin, run = copy.deepcopy(model), frozen(model)
    for _ in range(3):
        assert close(run(x), twin(x))


@torch.no_grad()
def test_factors_of_a_plan_are_constants_too(inner: Snapshot) -> None:
    model, x = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)).eval(), torch.randn(3, 24)
    options = {"inner": "eager", "measure": False, "budget": {"params": 0.5}}
    run, other = (
        frozen(model, budget={"params": 0.5}),
        torch.compile(copy.deepcopy(model), backend="tdpass", options=options),
    )
    assert close(run(x), other(x))
    assert not close(run(x), model(x))
    model[0].weight.mul_(-1)
    tdpass.invalidate(model)
    assert not close(run(x), other(x))


def test_training_graphs_are_left_exact(net: Net, inner: Snapshot, caplog: pytest.LogCaptureFixture) -> None:
    x, run = images(), frozen(net)
    with caplog.at_level(logging.WARNING, "tdpass.backend"):
        run(x).sum().backward()
    assert net.stem.weight.grad is not None
    assert (inner.constants, inner.operators, len(caplog.records)) == ([0], [0], 1)
    with torch.no_grad():
        before = run(x)
        net.stem.weight.mul_(2)
        assert torch.equal(run(x), before)


def test_inference_mode_and_autocast(net: Net) -> None:
    x = images()
    with torch.inference_mode():
        assert close(frozen(net)(x), net(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(frozen(net)(x), net(x), atol=0.1)


@torch.no_grad()
def test_compiled_graphs_die_with_their_weights(net: Net) -> None:
    run = frozen(net)
    run(images())
    count = sum(len(runner.cache) for runner in _RUNNERS)
    assert count > 0
    del run, net
    torch._dynamo.reset()
    gc.collect()
    assert sum(len(runner.cache) for runner in _RUNNERS) < count


@pytest.mark.parametrize("faster", [True, False])
@torch.no_grad()
def test_single_layers_are_operators_where_that_is_faster(
    faster: bool, net: Net, inner: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def choose(calls: Any, *, measure: bool = True) -> Verdict:
        seen.append(calls[0].call.frozen)
        return Verdict("channels" if faster or len(calls[0].call.spec.stages) > 1 else None, 1.0, 2.0)

    monkeypatch.setattr(fuse, "choose", choose)
    x = images()
    for options in ({"freeze": False}, {"freeze": True}, {"freeze": False, "alone": False}):
        torch._dynamo.reset()
        run = frozen(net, measure=True, **options)
        assert close(run(x), net(x))
        net.stem.weight.mul_(1.1)
        tdpass.invalidate(net)
        assert close(run(x), net(x))
    assert [inner.operators[index] for index in (0, 1, -1)] == ([3, 3, 1] if faster else [1, 1, 1])
    assert set(seen) == {False, True}


@torch.no_grad()
def test_constants_are_timed_laid_out() -> None:
    stage = tdpass.kernels.stage.Stage(8, 4, 1, (3, 3), (2, 2), (1, 1), (1, 1))
    spec = ChainSpec((stage,), 2, bias=True, activation="relu")
    calls = [ChainCall(spec, (1, 8, 9, 9), frozen=state) for state in (False, True)]
    assert in_torch(calls[0]).key("plain") != in_torch(calls[1]).key("plain")
    for call in calls:
        x, weight, bias = torch.randn(call.size), torch.randn(stage.shape), torch.randn(4)
        plain, *fused = (run() for run in convolutions(call, x, [weight], bias).values())
        for y in fused:
            assert close(y, plain)


def test_the_option_is_a_flag() -> None:
    with pytest.raises(UsageError, match="option freeze=1 "):
        Options.of({"freeze": 1})


@pytest.mark.slow
@torch.no_grad()
def test_inductor_packs_the_constants(net: Net) -> None:
    run = torch.compile(net, backend="tdpass", options={"freeze": True, "alone": False})
    x = images()
    assert close(run(x), net(x))
    net.stem.weight.mul_(2)
    tdpass.invalidate(net)
    assert close(run(x), net(x))
    net.head.weight = nn.Parameter(torch.randn_like(net.head.weight))
    assert close(run(x), net(x))
    for size in (3, 6, 1):
        x = images(size)
        assert close(run(x), net(x))
    net.stem.weight.mul_(2)
    tdpass.invalidate(net)
    for size in (5, 1):
        x = images(size)
        assert close(run(x), net(x))
    with torch.profiler.profile() as profile:
        run(x)
    names = {event.name for event in profile.events()}
    assert any("_convolution_pointwise" in name for name in names) or not torch.backends.mkldnn.is_available()
