"""SVD training: U diag(s) V^T in place of a weight, its terms, what is dropped, what goes back to dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tdpass
from tdpass.constraints.spectral import SPECTRAL
from tdpass.errors import UsageError
from tdpass.formats.layer import shrinks
from tdpass.methods import SvdTraining
from tdpass.models import open_model
from tdpass.site import Site
from tdpass.training.batches import Batches
from tdpass.training.singular import (
    SPARSITY,
    FewValues,
    Orthogonal,
    SingularValues,
    Triplet,
    triplets,
    with_singular_values,
)

CONV = Site("c", "conv", (6, 4, 3, 5), (2, 1), ((1, 1), (2, 2)), (1, 1))
SITES = [
    ("channel_svd", CONV),
    ("spatial_svd", CONV),
    ("svd", Site("l", "linear", (5, 9))),
    ("svd", Site("l", "linear", (9, 5))),
]
METHOD: dict[str, Any] = {"energy": 0.3, "sparse": 0.05, "sparsify": 2, "tune": 1}


class Net(nn.Module):
    """Two layers share a weight; one convolution is pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 16, 3, padding=1, padding_mode="reflect")
        self.point = nn.Conv2d(16, 12, 1)
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.point(torch.relu(self.wide(x)))).mean((2, 3))
        return self.two(torch.relu(self.one(x)))[:, :2]


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> Batches:
    labels = torch.arange(64) % 2
    return Batches(
        torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(1)) + labels.view(-1, 1, 1, 1),
        labels,
        16,
    )


def triplet(rank: int = 5) -> Triplet:
    generator = torch.Generator().manual_seed(2)
    u, s, v = (
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in ((7, rank), (rank,), (6, rank))
    )
    return Triplet(u, s, v, lambda: (u * s) @ v.T)


def moved(term: Any, layer: Triplet) -> list[Tensor]:
    """The gradients that a term adds to those of a task that has none."""
    parameters = [layer.u, layer.s, layer.v]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        term.before_step(torch.optim.SGD(parameters, 0.1))
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize(("name", "site"), SITES)
def test_a_weight_begins_as_its_singular_value_decomposition(name: str, site: Site) -> None:
    weight = torch.randn(site.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = SingularValues(site, name)
    u, s, v = held.right_inverse(weight)
    (unfolded,) = SPECTRAL[name].unfoldings(weight, site, 1)
    torch.testing.assert_close(s, torch.linalg.svdvals(unfolded))
    for vectors in (u, v):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(s), dtype=torch.float64))
    torch.testing.assert_close(held(u, s, v), weight)
    nearest = SPECTRAL[name].nearest(weight, site, (2,))
    torch.testing.assert_close(held(u, torch.where(torch.arange(len(s)) < 2, s, 0), v), nearest)


def test_the_orthogonality_term_has_the_gradient_of_its_formula() -> None:
    layer = triplet()
    eye = torch.eye(5, dtype=torch.float64)
    value = 3.0 * sum((factor.T @ factor - eye).square().sum() for factor in (layer.u, layer.v)) / 25
    expected = torch.autograd.grad(value, [layer.u, layer.v])
    u, s, v = moved(Orthogonal({"l": layer}, 3.0), layer)
    torch.testing.assert_close([u, v], list(expected))
    assert not s.any()
    gaps = sum(float((factor.T @ factor - eye).detach().square().sum()) for factor in (layer.u, layer.v))
    assert Orthogonal({"l": layer}, 3.0).residuals()["l"] == pytest.approx((gaps / 10) ** 0.5)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("hoyer", lambda s: s.sign() / s.norm() - s.abs().sum() * s / s.norm() ** 3),
        (
            "hoyer-square",
            lambda s: 2 * s.abs().sum() / s.norm() ** 2 * (s.sign() - s.abs().sum() * s / s.norm() ** 2),
        ),
        ("l1", torch.sign),
    ],
)
def test_the_sparsity_terms_have_the_gradients_of_their_formulas(name: str, formula: Any) -> None:
    layer = triplet()
    with torch.no_grad():
        layer.s[2] = 0.0
    u, s, v = moved(FewValues({"l": layer}, name, 0.5), layer)
    torch.testing.assert_close(s, 0.5 * formula(layer.s.detach()))
    assert s[2] == 0
    assert not u.any()
    assert not v.any()
    with torch.no_grad():
        layer.s.zero_()
    assert not moved(FewValues({"l": layer}, name, 0.5), layer)[1].any()


def test_every_sparsity_term_is_checked() -> None:
    assert set(SPARSITY) == {"hoyer", "hoyer-square", "l1"}


@pytest.mark.parametrize(("energy", "rank"), [(0.0, 4), (0.009, 4), (0.011, 3), (0.06, 2), (0.99, 1)])
def test_singular_values_go_by_energy(energy: float, rank: int) -> None:
    layer = triplet()
    with torch.no_grad():
        layer.s.copy_(torch.tensor([1.0, -3.0, 0.0, 9.0, 2.0]).double() / 95**0.5)
    assert layer.rank(energy) == rank
    layer.keep(rank)
    squares = torch.tensor([81.0, 9.0, 4.0, 1.0]).double() / 95
    torch.testing.assert_close(
        layer.s.detach().square().sort(descending=True).values[:4], squares * (torch.arange(4) < rank)
    )


@pytest.mark.parametrize("form", ["channel_svd", "spatial_svd"])
def test_the_network_in_the_models_place_computes_the_same(form: str) -> None:
    model, x = network(), torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    method = SvdTraining(**METHOD, format=form)  # type: ignore[arg-type]
    trained = method.prepare(model)
    torch.testing.assert_close(trained(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    layers = triplets(trained, method.sites)
    assert {name: layer.s.numel() for name, layer in layers.items()} == {
        "wide": 9 if form == "channel_svd" else 3,
        "point": 12,
        "one": 12,
    }
    with torch.no_grad():
        layers["one"].s.mul_(2)
    torch.testing.assert_close(trained.two.weight, 2 * model.two.weight)


@pytest.mark.parametrize("form", ["channel_svd", "spatial_svd"])
def test_layers_that_do_not_pay_go_back_to_dense_and_shared_weights_stay_shared(form: str) -> None:
    artifact = tdpass.train(
        network(),
        batches(),
        {"svd-training": {**METHOD, "format": form}},
        settings={"lr": 0.02},
        control=False,
    )
    sites = {site.name: site for site in open_model(network()).sites()}
    choices = {choice.site: choice for choice in artifact.plan}
    assert set(choices) == set(sites)
    assert choices["wide"].kept_dense or shrinks(sites["wide"], choices["wide"].format, choices["wide"].rank)
    assert not choices["one"].kept_dense
    assert choices["point"].kept_dense or choices["point"].format == "channel_svd"
    assert artifact.model.one.u is artifact.model.two.u
    again = SvdTraining(**{**METHOD, "energy": 0.0}, format=form)  # type: ignore[arg-type]
    whole = tdpass.train(network(), batches(), again, settings={"lr": 0.02}, control=False)
    assert all(
        choice.kept_dense or shrinks(sites[choice.site], choice.format, choice.rank) for choice in whole.plan
    )
    assert any(choice.kept_dense for choice in whole.plan)
    (said,) = [note for note in whole.report.notes if "parameters" in note]
    network_trained = with_singular_values(
        network(), {name: (site, again.format_of(site)) for name, site in sites.items()}
    )
    assert f"{sum(parameter.numel() for parameter in network_trained.parameters()):,} parameters" in said


def test_without_rounds_it_is_the_truncated_decomposition() -> None:
    method = {"svd-training": {"energy": 0.3, "sparsify": 0, "tune": 0}}
    artifact = tdpass.train(network(), batches(), method, control=False)
    weight = network().one.weight.detach().double()
    squares = torch.linalg.svdvals(weight).square()
    (choice,) = [choice for choice in artifact.plan if choice.site == "one"]
    rank = choice.rank[0]
    assert float(squares[rank:].sum()) <= 0.3 * float(squares.sum()) < float(squares[rank - 1 :].sum())
    assert choice.error == pytest.approx(float((squares[rank:].sum() / squares.sum()).sqrt()), rel=1e-4)


def test_the_prepared_network_is_what_is_attached() -> None:
    model = network()
    with pytest.raises(UsageError, match=r"network = method\.prepare"):
        SvdTraining(**METHOD).attach(model, torch.optim.SGD(model.parameters(), 0.1), every=2)
    method = SvdTraining(**METHOD)
    method.prepare(model)
    with pytest.raises(UsageError, match=r"prepare\(\) returned"):
        method.attach(model, torch.optim.SGD(model.parameters(), 0.1), every=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": "tucker2"},
        {"sparsity": "l2"},
        {"energy": 1.0},
        {"energy": -0.1},
        {"sparse": -1.0},
        {"orthogonal": -1.0},
    ],
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        SvdTraining(**wrong)


class Reader(nn.Module):
    """A recurrent network with two layers and a classifier on its last state."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.rnn = kind(6, 16, 2, batch_first=True)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, 6, 6]`, read row by row."""
        return self.out(self.rnn(x.squeeze(1))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_train_as_singular_values(kind: type[nn.LSTM | nn.GRU]) -> None:
    torch.manual_seed(0)
    model, x = tdpass.open_recurrent(Reader(kind)), torch.randn(3, 1, 6, 6)
    method = SvdTraining(budget={"params": 0.5}, sparse=0.02, sparsify=3, tune=2)
    trained = method.prepare(model, x)
    assert set(method.sites) == {*(f"rnn.{part}_l{k}" for part in ("input", "hidden") for k in (0, 1)), "out"}
    torch.testing.assert_close(trained(x), model(x), rtol=1e-5, atol=1e-5)
    made = []
    for module in trained.modules():
        if isinstance(module, SingularValues):
            module.register_forward_hook(lambda module, inputs, output: made.append(output))
    trained(x)
    assert len(made) == len(method.sites)  # once a call, not once a step of the recurrence
    with torch.no_grad():
        torch.testing.assert_close(trained(x), model(x), rtol=1e-5, atol=1e-5)
    options = {"svd-training": {"budget": {"params": 0.5}, "sparse": 0.02, "sparsify": 3, "tune": 2}}
    artifact = tdpass.train(model, batches(), options, settings={"lr": 0.1}, example_inputs=x, control=False)
    choices = {choice.site: choice for choice in artifact.plan}
    assert {choices[f"rnn.hidden_l{k}"].format for k in (0, 1)} == {"svd"}
    assert 0.35 < artifact.report.final.params / artifact.report.original.params <= 0.5
    assert artifact.report.training[-1].loss < artifact.report.training[0].loss


def test_the_memory_that_training_holds_is_reported() -> None:
    method = {"svd-training": {"energy": 0.3, "sparsify": 1, "tune": 0}}
    settings = {"optimizer": "adam", "lr": 0.01, "schedule": 1.0}
    dense = sum(parameter.numel() for parameter in network().parameters())
    prepared = SvdTraining(energy=0.3).prepare(network())
    factored = sum(parameter.numel() for parameter in prepared.parameters())
    steps = 4 * len(list(prepared.parameters())), 4 * len(list(network().parameters()))
    artifact = tdpass.train(network(), batches(), method, settings=settings)
    rows = {row.stage: row for row in artifact.report.training}
    # weights, gradients, two moments; a count of steps for each tensor
    assert rows["method"].memory == 4 * 4 * factored + steps[0]
    assert rows["control"].memory == 4 * 4 * dense + steps[1]
    assert any(f"trained {factored:,} parameters" in note for note in artifact.report.notes)
