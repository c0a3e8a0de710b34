"""The curvature of the loss, and weights settled by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdpass.constraints.levels import UniformLevels
from tdpass.errors import UsageError
from tdpass.training import settling
from tdpass.training.gauss_newton import TEMPERATURE, gauss_newton
from tdpass.training.settling import Settling
from tdpass.training.terms import Hooks


def test_of_a_linear_model_it_is_the_hessian() -> None:
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(4, 3), torch.randn(7, 4), torch.arange(7) % 3

    def total(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return TEMPERATURE**2 * F.cross_entropy(F.linear(inputs, weight, bias) / TEMPERATURE, targets, reduction="sum")

    blocks = torch.autograd.functional.hessian(total, (model.weight.detach(), model.bias.detach()))
    exact = torch.cat([torch.cat([blocks[i][j].reshape((12, 3)[i], (12, 3)[j]) for j in range(2)], 1) for i in range(2)])
    found = gauss_newton(model, (inputs,), {"weight": torch.arange(12), "bias": torch.arange(3)})
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    chosen = torch.tensor([2, 11])
    torch.testing.assert_close(gauss_newton(model, (inputs,), {"weight": chosen}), exact[chosen][:, chosen], rtol=1e-4, atol=1e-5)


def test_in_pieces_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).train(), (torch.randn(9, 4),)
    entries = {"0.weight": torch.arange(20), "2.bias": torch.arange(3)}
    at_once = gauss_newton(model, inputs, entries)
    assert model.training
    monkeypatch.setattr("tdpass.training.gauss_newton._ROOM", 3 * 23 * 2)
    torch.testing.assert_close(gauss_newton(model, inputs, entries), at_once)


def test_other_outputs_are_refused() -> None:
    with pytest.raises(UsageError, match="class scores"):
        gauss_newton(nn.Flatten(0), (torch.randn(3, 4),), {})


def settled(share: float, model: nn.Linear, samples: int = 4) -> Settling:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    levels = {"weight": UniformLevels(2, 0.2)}
    term = Settling(model, lambda: model, {"weight": model.weight}, levels, {"bias": model.bias}, share, samples)
    hooks = Hooks(optimizer, [term], lambda step: step == 0, 1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        inputs = torch.randn(8, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), torch.arange(8) % 3).backward()
        optimizer.step()
    hooks.remove()
    return term


def network() -> nn.Linear:
    torch.manual_seed(1)
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight[0, :2] = 0
    return model


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_share_is_put_on_levels_and_the_pruned_stay_pruned(share: float) -> None:
    model = network()
    before = model.weight.detach().clone()
    term = settled(share, model)
    assert term.settled()
    assert term.hook is None
    assert torch.equal(model.weight == 0, before == 0)
    on_level = ((model.weight.abs() - 0.2).abs() < 1e-6) | ((model.weight.abs() - 0.4).abs() < 1e-6)
    assert int((on_level & term.masks["weight"]).sum()) == round(share * 16)
    assert not term.masks["bias"].any()


def test_nothing_moves_before_there_are_samples_enough() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    term = settled(1.0, model, samples=1000)
    assert not term.settled()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_more_unknowns_than_can_be_solved_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "LARGEST", 10)
    with pytest.raises(UsageError, match="unknowns"):
        settled(1.0, network())


def test_levels_without_interval_are_refused() -> None:
    model = network()
    with pytest.raises(UsageError, match="interval"):
        Settling(model, lambda: model, {"weight": model.weight}, {"weight": UniformLevels(2)}, {"bias": model.bias}, 1.0)
