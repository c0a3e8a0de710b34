"""Programs of `tensor_chain` against the layers they come from."""

from __future__ import annotations

import math

import pytest
import torch

from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.formats.contraction import contraction_of
from tdpass.kernels.tensor_chain import reference
from tdpass.site import Site


def layer_of(name: str, site: Site, rank: tuple[int, ...]) -> Layer:
    shapes = FORMATS.get(name).shapes(site, rank)
    return Layer(
        site,
        Form(name, rank),
        {key: torch.randn(shape).double() / math.prod(shape) ** 0.25 for key, shape in shapes.items()},
    )


@pytest.mark.parametrize(
    ("name", "shape", "rank"),
    [
        ("tensor_train", (12, 20), (3,)),
        ("tensor_train", (96, 60), (3, 2)),
        ("tensor_train", (7, 13), (2, 1)),
        ("tensor_train", (64, 96), (2, 3, 4)),
        ("tensor_ring", (96, 60), (2, 3, 4, 5)),
        ("tensor_ring", (7, 13), (1, 1, 1, 1)),
        ("block_term", (96, 60), (2, 3, 4)),
        ("block_term", (7, 15), (1, 7, 5)),
    ],
)
def test_a_contraction_computes_its_layer(name: str, shape: tuple[int, int], rank: tuple[int, ...]) -> None:
    layer = layer_of(name, Site("s", "linear", shape), rank)
    contraction = contraction_of(layer)
    assert contraction is not None
    steps, weights = contraction
    x = torch.randn(3, 5, shape[1]).double()
    y = reference(x, weights, None, None, [value for step in steps for value in step.integers()], "identity")
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


def test_other_layers_have_no_contraction() -> None:
    assert contraction_of(layer_of("svd", Site("s", "linear", (8, 6)), (2,))) is None
    conv = Site("s", "conv", (8, 6, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    assert contraction_of(layer_of("tensor_train", conv, (2, 2))) is None
