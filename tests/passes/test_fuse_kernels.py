"""fuse-kernels on torch models: the same numbers, parameters and behaviour, in one operator per layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.cost import Cost
from tdpass.formats import FORMATS
from tdpass.formats.base import Format, Layer, dense_cost
from tdpass.formats.lowering import lower
from tdpass.kernels import native
from tdpass.models.factorized import Factorized
from tdpass.models.fused import Fused
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.site import Site

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())

SITES = {
    "conv": (Site("0", "conv", (9, 6, 3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1), True), (2, 6, 8, 7)),
    "conv1d": (Site("0", "conv", (9, 6, 5), (1,), ((2, 2),), (1,), True), (2, 6, 11)),
    "linear": (Site("0", "linear", (9, 6), bias=True), (2, 3, 6)),
}
FUSE = "fuse-kernels{measure=false}"


def dense(kind: str) -> nn.Module:
    layers = {"conv": lambda: nn.Conv2d(6, 9, 3, (2, 1), 1), "conv1d": lambda: nn.Conv1d(6, 9, 5, padding=2), "linear": lambda: nn.Linear(6, 9)}
    return nn.Sequential(layers[kind](), nn.ReLU()).eval()


def cases() -> Iterator[tuple[str, Format]]:
    for kind, (site, _) in SITES.items():
        for fmt in FORMATS:
            if fmt.fits(site) and lower(Layer(site, fmt.name, middle(fmt, site), fmt.factorize(torch.randn(site.shape), site, middle(fmt, site)))):
                yield kind, fmt


def middle(fmt: Format, site: Site) -> tuple[int, ...]:
    return fmt.ranks(site)[len(fmt.ranks(site)) // 2]


def plan_of(kind: str, fmt: Format) -> RankPlan:
    site = SITES[kind][0]
    cost = dense_cost(site)
    return RankPlan((Choice("0", site.shape, fmt.name, middle(fmt, site), cost, cost),), Cost(1000, 1000, 4000))


def fused_and_plain(kind: str, fmt: Format) -> tuple[nn.Module, nn.Module, Tensor]:
    x = torch.randn(SITES[kind][1])
    model, plan = dense(kind), plan_of(kind, fmt)
    results = [tdpass.compress(model, plan=plan, pipeline=f"factorize{tail}", example_inputs=x).model for tail in ("", "," + FUSE)]
    plain, fused = results
    assert isinstance(plain, nn.Module)
    assert isinstance(fused, nn.Module)
    assert isinstance(plain[0], Factorized)
    assert isinstance(fused[0], Fused)
    return fused, plain, x


@pytest.mark.parametrize(("kind", "fmt"), [pytest.param(kind, fmt, id=f"{kind}-{fmt.name}") for kind, fmt in cases()])
def test_every_format_that_lowers_gives_the_same_numbers(kind: str, fmt: Format) -> None:
    fused, plain, x = fused_and_plain(kind, fmt)
    with torch.no_grad():
        expected = plain(x)
        assert torch.allclose(fused(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(copy.deepcopy(fused)(x), expected, rtol=1e-4, atol=1e-5)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(fused[1], nn.Identity), "the activation is part of the operator"


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    return fused_and_plain("conv", FORMATS.get("tucker2"))


def test_gradients_are_those_of_the_plain_layers(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fused, plain, x = pair
    for model in (fused, plain):
        model(x).square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_weights_may_change_in_place(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fused, plain, x = pair
    with torch.no_grad():
        fused(x)
        for model in pair[:2]:
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert torch.allclose(fused(x), plain(x), rtol=1e-4, atol=1e-5)
        state = {name: value * 0.5 for name, value in plain.state_dict().items()}
        for model in pair[:2]:
            model.load_state_dict(state)
        assert torch.allclose(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_it_exports(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fused, plain, x = pair
    program = torch.export.export(fused, (x,), strict=False)
    with torch.no_grad():
        assert torch.allclose(program.module()(x), plain(x), rtol=1e-4, atol=1e-5)


def test_it_saves_and_loads(pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: object) -> None:
    x = pair[2]
    fmt = FORMATS.get("tucker2")
    artifact = tdpass.compress(dense("conv"), plan=plan_of("conv", fmt), pipeline="factorize," + FUSE, example_inputs=x)
    artifact.save(f"{tmp_path}/fused.safetensors")
    loaded = tdpass.load(f"{tmp_path}/fused.safetensors", dense("conv"))
    assert isinstance(loaded, nn.Module)
    assert isinstance(artifact.model, nn.Module)
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(x), artifact.model(x), rtol=1e-4, atol=1e-5)


def test_lanes_must_be_known(residual: nn.Module, images: Tensor) -> None:
    with pytest.raises(tdpass.UsageError, match="one of auto, channels, pixels"):
        tdpass.compress(residual, {"macs": 0.5}, images, pipeline="plan,factorize,fuse-kernels{lanes=rows}")
