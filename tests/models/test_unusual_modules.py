"""Modules in states that torch allows and tools stumble over.

Each is compressed, or refused with the next step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tdpass.data import as_batches
from tdpass.errors import InvalidModelError, UnsupportedError, UsageError
from tdpass.models import open_model
from tdpass.verbs import compress

X = torch.randn(65, 20, generator=torch.Generator().manual_seed(1))


def _mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6)).eval()


class _Keeping(nn.Module):
    """Keeps what it computed, in the ways that code does."""

    def __init__(self, keep: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.net, self.keep = _mlp(), keep
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.keep(self, y)
        return y  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "keep",
    [
        lambda module, y: setattr(module, "seen", y),
        lambda module, y: setattr(module, "last", y),
        lambda module, y: setattr(module, "history", [{"y": (y, 1)}]),
    ],
    ids=["buffer", "attribute", "nested"],
)
def test_kept_activations_do_not_stand_in_the_way(keep: Callable[[nn.Module, Tensor], None]) -> None:
    net = _Keeping(keep).eval()
    before = net(X)
    made = compress(net, {"params": 0.9}, X, cache=False, formats=["svd"])
    torch.testing.assert_close(net.net(X), before)
    assert made.report.checks["relative_difference"] < 0.9


def _masked(net: nn.Sequential) -> None:
    prune.l1_unstructured(net[2], "weight", 0.5)


def _normed(net: nn.Sequential) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(net[2])


@pytest.mark.parametrize("change", [_masked, _normed])
def test_a_weight_that_a_hook_computes_is_made_a_parameter_first_and_the_report_says_so(
    change: Callable[[nn.Sequential], None],
) -> None:
    net = _mlp()
    change(net)
    made = compress(net, {"params": 0.9}, X, cache=False, formats=["svd"])
    assert any("are parameters now: 2" in note for note in made.report.notes)
    assert made.plan is not None
    assert "2" in {choice.site for choice in made.plan}
    assert any(not choice.kept_dense for choice in made.plan)
    assert 0 < made.report.checks["relative_difference"] < 0.9


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = _mlp()
    made = compress(net, {"params": 0.6}, X, cache=False, formats=["svd"])
    twin = compress(_mlp(), {"params": 0.6}, X, cache=False, formats=["svd"])
    assert made.plan is not None
    assert twin.plan is not None
    assert [(choice.site, choice.rank) for choice in made.plan] == [
        (choice.site, choice.rank) for choice in twin.plan
    ]
    assert made.report.checks["divergence"] == pytest.approx(twin.report.checks["divergence"], rel=1e-3)


def _meta() -> nn.Module:
    with torch.device("meta"):
        return _mlp()


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(_mlp())  # type: ignore[no-any-return]


@pytest.mark.parametrize("data", [None, X], ids=["no data", "data"])
@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8)), InvalidModelError, "run the model once"),
        (
            lambda: nn.Sequential(nn.Linear(20, 8), nn.LazyBatchNorm1d()),
            InvalidModelError,
            "run the model once",
        ),
        (_meta, InvalidModelError, "meta device"),
        (_scripted, UnsupportedError, "ScriptModule"),
    ],
    ids=["lazy", "lazy norm", "meta", "script"],
)
def test_what_has_no_values_is_refused(
    make: Callable[[], nn.Module], kind: type[Exception], text: str, data: Tensor | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lazy modules warn of themselves
        net = make()
    with pytest.raises(kind, match=text):
        compress(net, {"params": 0.5}, data, cache=False)


def test_what_cannot_be_copied_is_named() -> None:
    net = _mlp()
    net.lock = (value for value in ())
    with pytest.raises(InvalidModelError, match=r"cannot be copied: .*generator"):
        compress(net, {"params": 0.5}, X, cache=False)


def test_a_batchnorm_at_the_input_learns_from_every_batch_but_a_single_sample() -> None:
    net = nn.Sequential(nn.BatchNorm1d(20), *_mlp()).eval()
    made = open_model(net).clone()

    batches = as_batches(X, batch_size=64)
    assert [batch.size for batch in batches] == [64, 1]
    undo = made.recalibrate_batchnorm(batches)
    assert undo is not None
    norm = made.unwrap()[0]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, X[:64].mean(0))
    torch.testing.assert_close(norm.running_var, X[:64].var(0))
    undo()
    torch.testing.assert_close(norm.running_mean, torch.zeros(20))
    only = open_model(net).clone()
    only.recalibrate_batchnorm(batches[1:])
    torch.testing.assert_close(only.unwrap()[0].running_var, torch.ones(20))  # type: ignore[index]
    assert compress(net, {"params": 0.6}, X, cache=False, formats=["svd"]).report.checks["samples"] == 65


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((2, 4), np.float32),
        {"input": np.zeros((2, 4), np.float32)},
        (np.zeros(2),),
        {"input": None},
        3,
    ],
)
def test_example_inputs_that_are_no_tensors_are_refused_with_what_they_are(given: Any) -> None:
    with pytest.raises(UsageError, match=r"example_inputs hold a (ndarray|NoneType|int); give a tensor"):
        compress(nn.Linear(4, 4), {"params": 0.5}, example_inputs=given)


class OneSample(nn.Module):
    """Convolutions with a residual sum, of one sample without an axis for it."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[axes - 1]
        self.axes, self.first, self.second = axes, conv(8, 8, 3, padding=1), conv(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 1 + self.axes
        return self.second(torch.relu(self.first(x))) + x


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("share", [0.1, 0.7])
def test_convolutions_of_single_samples_are_compressed(axes: int, share: float) -> None:
    network = OneSample(axes).eval()
    samples = [torch.randn(8, *(6, 6)[:axes]) for _ in range(8)]
    artifact = compress(network, {"macs": share}, samples, cache=False, effort="fast")
    assert artifact.report.final.macs <= share * artifact.report.original.macs
    assert artifact.report.original.macs == 2 * 8 * 8 * 3**axes * 6**axes
    assert isinstance(artifact.model, nn.Module)
    with torch.no_grad():
        before, after = (torch.stack([net(x) for x in samples]) for net in (network, artifact.model))
    assert float((after - before).norm() / before.norm()) == pytest.approx(
        artifact.report.checks["relative_difference"], rel=1e-3
    )


class Counting(nn.Module):
    """Writes to a buffer in place, puts another in its place, and makes one at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean()
        if "table" not in self._buffers:
            self.register_buffer("table", torch.ones(12))
        return self.layer(x * self.table)


def test_runs_leave_the_buffers_of_a_model_as_they_were() -> None:
    network, x = Counting().eval(), torch.randn(16, 12)
    artifact = compress(network, {"params": 0.7}, x, cache=False, effort="fast")
    for net in (network, artifact.model):
        assert isinstance(net, Counting)
        assert {name: float(buffer) for name, buffer in net.named_buffers()} == {"calls": 0, "last": 0}
