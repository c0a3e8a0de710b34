"""Cascaded projection: the polar factor and its gradient, what is trained, and what comes out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdpass
from tdpass.errors import UsageError
from tdpass.methods import METHODS
from tdpass.methods.reconstruction import Reconstruction
from tdpass.training.batches import Batches
from tdpass.training.stiefel import NarrowWeight, Polar, Projection

NAME = "cascaded-projection"


def data() -> Batches:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(192) % 4
    images = torch.randn(192, 2, 8, 8, generator=generator) + labels[:, None, None, None] * torch.tensor(
        [0.5, -0.5]
    ).view(1, 2, 1, 1)
    return Batches(images, labels, 32)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def prepared(**options: object) -> tuple[object, nn.Module]:
    method = METHODS.get(NAME)(**{"rounds": 2, **options})
    return method, method.prepare(network(), torch.zeros(2, 2, 8, 8), data().inputs[:64])


@pytest.mark.parametrize("shape", [(7, 3), (5, 5), (6, 1)])
def test_the_gradient_of_the_polar_factor_is_right(shape: tuple[int, int]) -> None:
    q = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p = Polar.apply(q)
    assert torch.allclose(p.T @ p, torch.eye(shape[1], dtype=torch.float64), atol=1e-12)
    assert torch.autograd.gradcheck(Polar.apply, (q,))


def test_equal_singular_values_do_no_harm() -> None:
    q = torch.eye(6, dtype=torch.float64)[:, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(Polar.apply, (q,))
    (slope,) = torch.autograd.grad((Polar.apply(q) * torch.randn(6, 3, dtype=torch.float64)).sum(), q)
    assert bool(slope.isfinite().all())
    assert torch.equal(Polar.apply(3 * q), q)


def test_gradient_steps_on_the_proxy_reach_the_principal_directions() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 8, dtype=torch.float64, generator=generator) * torch.arange(
        1, 9, dtype=torch.float64
    )
    q = torch.randn(8, 3, dtype=torch.float64, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([q], lr=0.05)
    for _ in range(400):
        p = Polar.apply(q)
        loss = (x - x @ p @ p.T).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = torch.linalg.svdvals(x)[3:].square().sum()
    assert float(loss.detach()) == pytest.approx(float(best), rel=1e-6)


def test_a_narrow_weight_is_projected_on_both_sides() -> None:
    generator = torch.Generator().manual_seed(2)
    after, before = (
        Projection(torch.randn(6, 2, generator=generator)),
        Projection(torch.randn(4, 3, generator=generator)),
    )
    weight = torch.randn(6, 8, 3, generator=generator)
    made = NarrowWeight(after, before, 2)(weight)
    expected = torch.einsum("or,oisk,iq->rqsk", after(), weight.reshape(6, 4, 2, 3), before()).reshape(
        2, 6, 3
    )
    torch.testing.assert_close(made, expected)


def test_only_projections_train_and_are_multiplied_into_the_weights() -> None:
    method, net = prepared(width=0.5)
    weights = {name: value.clone() for name, value in net.state_dict().items() if "original" in name}
    assert {
        name.rpartition(".")[2] for name, parameter in net.named_parameters() if parameter.requires_grad
    } == {"q", "shift"}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    method.attach(net, optimizer, every=2)
    for inputs, targets in [*data()][:4]:
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    artifact = method.finish(net)
    assert weights
    assert all(torch.equal(net.state_dict()[name], value) for name, value in weights.items())
    x = data().inputs[:16]
    torch.testing.assert_close(artifact.model.eval()(x), net.eval()(x), rtol=1e-4, atol=1e-5)
    assert [str(choice.form) for choice in artifact.plan] == [
        "dense out 6",
        "dense in 6 out 4",
        "dense in 64 out 8",
        "dense in 8",
    ]
    assert (
        artifact.report.final.params
        == sum(parameter.numel() for parameter in artifact.model.parameters())
        == artifact.plan.planned.params
    )
    assert artifact.report.final.macs < 0.5 * artifact.report.original.macs
    assert "the model returns its output" in artifact.report.declined["9"]


@pytest.mark.parametrize("train_weights", [False, True])
def test_reconstruction_alone_brings_answers_back(train_weights: bool) -> None:
    method, net = prepared(width=0.6, start="norm", gamma=1.0, train_weights=train_weights)
    moved = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moved, lr=0.02)
    method.attach(net, optimizer, every=100)
    found = []
    for _ in range(60):
        optimizer.zero_grad()
        (0.0 * sum(p.sum() for p in moved) + 0.0 * net(data().inputs[:2]).sum()).backward()
        optimizer.step()
        found.append(sum(value**2 for value in method.phased.residuals().values()))
    assert sum(found[-8:]) < 0.8 * sum(found[:8])


def test_learned_projections_lose_less_than_those_they_begin_from() -> None:
    dense = tdpass.train(network(), data(), pretrain=4, settings={"lr": 0.05}, control=False).model
    far = {}
    for rounds in (0, 4):
        options = {NAME: {"width": 0.4, "start": "norm", "rounds": max(rounds, 1)}}
        settings = {"optimizer": "adam", "lr": 2e-2 if rounds else 1e-12, "schedule": 1.0}
        given = {"calibration": data().inputs, "example_inputs": data().inputs[:2], "control": False}
        made = tdpass.train(copy.deepcopy(dense), data(), options, settings=settings, **given)
        far[rounds] = tdpass.verify(dense.eval(), made.model.eval(), data().inputs)["divergence"]
    assert far[4] < 0.7 * far[0]


def test_wrong_options_and_models_without_runs_are_refused() -> None:
    for wrong in ({"width": 0.0}, {"width": 1.0}, {"start": "best"}, {"gamma": -1.0}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))}="):
            METHODS.get(NAME)(**wrong)
    with pytest.raises(UsageError, match="pass example_inputs"):
        METHODS.get(NAME)().prepare(network())
    with pytest.raises(UsageError, match=r"no channel to project \(0: the model returns its output\)"):
        METHODS.get(NAME)().prepare(nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 4))


def test_layers_whose_answers_do_not_vary_are_not_held_to_anything() -> None:
    method, net = METHODS.get(NAME)(rounds=1), network()
    net = method.prepare(net, torch.zeros(2, 2, 8, 8))
    method.bind(net)
    (term,) = method.phases()[0].begin()
    assert isinstance(term, Reconstruction)
    assert not term.joints
    assert set(term.residuals().values()) == {0.0}
