"""One small layer of each kind that operators serve, in any form, and an input for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.layers.factorized import Factorized
from tdpass.site import Site

SITES = {
    "linear": Site("l", "linear", (48, 64), extents=(((5,), (5,)),)),
    "image": Site("l", "conv", (32, 16, 3, 3), (2, 1), ((1, 1), (0, 1)), (1, 1), extents=(((9, 9), (5, 8)),)),
    "signal": Site("l", "conv", (32, 16, 3), (1,), ((1, 1),), (1,), extents=(((9,), (9,)),)),
}
INPUTS = {"linear": (2, 5, 64), "image": (2, 16, 9, 9), "signal": (2, 16, 9)}
THIN = {"linear": "svd", "image": "channel_svd", "signal": "channel_svd"}


def layer_of(kind: str, text: str) -> Layer:
    site, form = SITES[kind], Form.parse(text.format(THIN[kind]))
    torch.manual_seed(0)
    fmt = FORMATS.get(form.format)
    factors = {name: torch.randn(shape) for name, shape in fmt.shapes(site, form.rank).items()}
    return Layer(site, Form(form.format, form.rank), factors, torch.randn(site.o)).stored(form)


def module_of(kind: str, text: str, *pads: object) -> Factorized:
    layer = layer_of(kind, text)
    assert layer.bias is not None
    return Factorized(layer, nn.Parameter(layer.bias), *pads).eval()


def input_of(kind: str) -> Tensor:
    return torch.randn(INPUTS[kind], generator=torch.Generator().manual_seed(1))
