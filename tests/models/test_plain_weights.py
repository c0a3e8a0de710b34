"""Weights that a norm, parametrization or mask computes are made parameters before compression."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import tdpass
from tdpass.errors import PlanError
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.models.torch.modules.plain import make_plain

X = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _old(norm: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def apply(layer: nn.Module) -> nn.Module:
        with pytest.warns(FutureWarning, match="deprecated"):
            return norm(layer)

    return apply


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "old_weight_norm": _old(nn.utils.weight_norm),
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}
each = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def network(way: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(way(nn.Linear(24, 32)), nn.ReLU(), nn.Linear(32, 8))
    net(X)  # what a hook computes is there
    return net.eval()


@each
def test_it_is_compressed_saved_and_loaded_on_the_class_it_had(
    way: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    net = network(way)
    keys = list(net.state_dict())
    with torch.no_grad():
        before = net(X)
    result = tdpass.compress(net, {"params": 0.7}, X, effort="fast", progress=False)
    assert {choice.site for choice in result.plan} == {"0", "2"}
    assert any("are parameters now: 0" in note for note in result.report.notes)
    assert list(net.state_dict()) == keys
    path = tmp_path / "small.safetensors"
    result.save(path)
    loaded = tdpass.load(path, network(way))
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), result.model(X))
        torch.testing.assert_close(net(X), before)


@each
def test_the_layer_computes_the_same_with_fewer_tensors(way: Callable[[nn.Module], nn.Module]) -> None:
    net = network(way)
    with torch.no_grad():
        before = net(X)
        assert make_plain(net) == ["0"]
        torch.testing.assert_close(net(X), before)
    assert set(net.state_dict()) == {
        "0.weight", "0.bias", "2.weight", "2.bias"
    }  # fmt: skip
    assert isinstance(net[0].weight, nn.Parameter)
    assert make_plain(net) == []


def test_a_shared_parameter_is_left_computed() -> None:
    net = network(parametrizations.spectral_norm)
    net.append(nn.Linear(8, 8))
    original = net[0].parametrizations.weight.original
    net[0].register_parameter("also", original)
    model = open_model(net, Batch((X,)))
    assert model.make_plain() == []
    assert "shares a parameter" in model.declined()["0"]


def test_a_model_that_a_file_does_not_fit_is_as_it_was(tmp_path: Path) -> None:
    small = tdpass.compress(network(WAYS["weight_norm"]), {"params": 0.7}, X, effort="fast", progress=False)
    small.save(tmp_path / "small.safetensors")
    other = nn.Sequential(parametrizations.weight_norm(nn.Linear(24, 30)), nn.ReLU(), nn.Linear(30, 8)).eval()
    keys, answer = list(other.state_dict()), other(X)
    with pytest.raises(PlanError):
        tdpass.load(tmp_path / "small.safetensors", other)
    assert list(other.state_dict()) == keys
    torch.testing.assert_close(other(X), answer)


def test_a_plain_layer_in_a_file_that_holds_it_computed_stays_computed(tmp_path: Path) -> None:
    """What was left as it was is stored under its own names, and loads so."""
    net = network(parametrizations.weight_norm)
    assert make_plain(net, frozenset(net.state_dict())) == []
