"""The dense weight of a factored layer is made only where its numbers are read, and is right there.

Where only its type or size is read it costs nothing.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.form import Form
from tdpass.formats import FORMATS
from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.kinds import KINDS
from tdpass.layers.factorized import Factorized
from tdpass.site import Site

SITES = tuple(site for kind in KINDS for site in kind.examples())
CASES = [
    (name, site, dtype)
    for name in FORMATS.names()
    for site in SITES
    if FORMATS.get(name).fits(site) and FORMATS.get(name).offered
    for dtype in (torch.float32, torch.float16)
]
each_case = pytest.mark.parametrize(
    ("name", "site", "dtype"), CASES, ids=lambda value: getattr(value, "name", str(value))
)


def factored(name: str, site: Site, dtype: torch.dtype, bias: bool = False) -> Factorized:
    fmt, weight = FORMATS.get(name), torch.randn(site.shape, dtype=torch.float64)
    rank = fmt.ranks(site)[0]
    factors = fmt.decompose(weight, site, Metric(groups=site.groups)).factors(rank)
    held = nn.Parameter(torch.zeros(site.o, dtype=dtype)) if bias else None
    return Factorized(
        Layer(site, Form(name, rank), {key: value.to(dtype) for key, value in factors.items()}), held
    )


@each_case
def test_it_is_the_weight_that_gradients_see(name: str, site: Site, dtype: torch.dtype) -> None:
    layer = factored(name, site, dtype)
    dense = layer.weight
    with torch.no_grad():
        weight = layer.weight
        assert (weight.dtype, weight.shape, weight.device) == (dense.dtype, dense.shape, dense.device)
        assert torch.equal(weight + 0, dense)
        assert weight.tolist() == dense.tolist()


@pytest.fixture
def layer() -> Factorized:
    linear = next(site for site in SITES if site.kind == "linear")
    return factored("svd", linear, torch.float32, bias=True)


def test_type_and_size_multiply_nothing_out(layer: Factorized, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> Tensor:
        raise AssertionError("the dense weight was multiplied out")

    monkeypatch.setattr(layer.format, "reconstruct", never)
    with torch.no_grad():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert weight.dtype == torch.float32
        assert weight.is_floating_point()
        assert not weight.requires_grad
        assert weight.shape == weight.size() == (layer.out_features, layer.in_features)
        assert (weight.ndim, weight.dim(), len(weight)) == (2, 2, layer.out_features)
        assert weight.numel() == layer.out_features * layer.in_features
        with pytest.raises(AssertionError, match="multiplied out"):
            weight.sum()


def test_numbers_are_read_in_every_way(layer: Factorized) -> None:
    dense, x, stored = layer.weight.detach(), torch.randn(3, layer.in_features), io.BytesIO()
    with torch.no_grad():
        weight = layer.weight
        torch.save(weight, stored)
        stored.seek(0)
        read = [
            weight.t().t(),
            torch.cat([weight]),
            weight.detach(),
            weight.data,
            copy.deepcopy(weight),
            weight.clone(),
        ]
        read += [torch.from_numpy(weight.numpy()), torch.load(stored), weight.to(torch.float64).float()]
        assert all(torch.equal(each, dense) and type(each) is Tensor for each in read)
        assert torch.equal(F.linear(x, weight), F.linear(x, dense))
        assert torch.equal(torch.empty_like(weight).copy_(weight), dense)


def test_gradients_reach_the_factors(layer: Factorized) -> None:
    layer.weight.square().sum().backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in layer.factors().values())
