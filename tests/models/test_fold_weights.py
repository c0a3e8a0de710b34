"""Weights that a graph computes from stored tensors become parameters, where nothing else reads these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn.utils import parametrizations

import tdpass
from tdpass.models import open_model
from tdpass.models.abilities import MakesPlain
from tdpass.models.base import Batch, Model

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


class Computed(nn.Module):
    """A layer whose weight is `compute(u, v)`; with `beside` it reads v again."""

    def __init__(
        self, compute: Callable[[Tensor, Tensor], Tensor], u: int, v: int, beside: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.u = nn.Parameter(torch.randn(12, u, generator=generator))
        self.v = nn.Parameter(torch.randn(v, 12, generator=generator))
        self.compute, self.beside = compute, beside

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.compute(self.u, self.v))
        return y + (x[0] * self.v).sum() if self.beside else y


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def opened(module: nn.Module) -> Model:
    model = open_model(torch.export.export(module.eval(), (X,), strict=False))
    assert isinstance(model, MakesPlain)
    model.make_plain()
    model.observe(Batch((X,)))
    torch.testing.assert_close(model.run(Batch((X,))), module(X))
    return model


def test_a_scaled_weight_is_a_site_and_what_it_was_made_of_is_gone() -> None:
    module = Computed(lambda u, v: u * v, 1, 12)
    model = opened(module)
    (site,) = model.sites()
    torch.testing.assert_close(model.weight(site.name), (module.u * module.v).detach())
    assert model.params() == 144


@pytest.mark.parametrize(
    "module",
    [Computed(lambda u, v: u * v, 1, 1), Computed(lambda u, v: u * v, 1, 12, beside=True)],
    ids=["an outer product", "read beside"],
)
def test_a_weight_that_would_take_more_room_or_is_read_apart_stays_computed(module: Computed) -> None:
    model = opened(module)
    assert model.sites() == []
    assert model.params() == module.u.numel() + module.v.numel()


def test_slices_of_a_weight_are_sites_before_anything_is_made_plain() -> None:
    module = Computed(lambda u, v: u.chunk(2, 1)[1] + 0 * v, 24, 12)
    assert open_model(torch.export.export(module, (X,), strict=False)).sites() == []  # it is also scaled
    (site,) = open_model(torch.export.export(Sliced(), (X,), strict=False)).sites()
    assert (site.name, site.shape) == ("u.1", (12, 12))


class Sliced(Computed):
    def __init__(self) -> None:
        super().__init__(lambda u, _v: u, 24, 12)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.u.chunk(2, 1)
        return F.linear(x, second) + first.sum()


def test_a_normed_layer_that_is_called_twice_is_one_site() -> None:
    model = opened(Twice())
    assert [site.name for site in model.sites()] == ["layer"]
    assert model.params() == 12 * 12 + 12


def test_a_compressed_graph_of_normed_weights_is_loaded_again(tmp_path: Path) -> None:
    traced, program = symbolic_trace(Twice().eval()), torch.export.export(Twice().eval(), (X,), strict=False)
    for dense, path, load in (
        (traced, tmp_path / "small.safetensors", lambda path: tdpass.load(path, traced)),
        (program, tmp_path / "small.pt2", torch.export.load),
    ):
        small = tdpass.compress(dense, {"params": 0.7}, data=X, progress=False, cache=False, effort="fast")
        (choice,) = small.plan.choices
        assert choice.form.factored
        small.save(path)
        wanted = open_model(small.model).run(Batch((X,)))
        torch.testing.assert_close(open_model(load(path)).run(Batch((X,))), wanted)
