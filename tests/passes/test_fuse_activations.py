"""Activations behind a layer of encoded factors move into its operator, however factors are stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdpass
from tdpass.kernels import native
from tdpass.layers.float_chain import FloatChain
from tdpass.layers.fused import layer_by_layer
from tdpass.layers.integer_chain import IntegerChain
from tdpass.layers.one_operator import OneOperator
from tdpass.layers.weight_only import WeightOnly

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


@pytest.mark.parametrize(
    ("steps", "kind", "apart"),
    [
        ("quantize,quantize-activations{calibration=minmax}", IntegerChain, 2e-2),
        ("quantize{numbers=bfloat16}", FloatChain, 1e-5),
        ("quantize{numbers=int4/32}", WeightOnly, 1e-5),
    ],
)
@torch.no_grad()
def test_an_activation_in_a_row_of_layers_moves_into_the_operator(
    steps: str, kind: type[OneOperator], apart: float
) -> None:
    ends = (nn.GELU(), nn.SiLU(), nn.ReLU6(), nn.Hardtanh(0.0, 6.0), nn.Hardtanh(-0.25, 0.1))
    rows = [part for end in ends for part in (nn.Linear(64, 64), end)]
    net = nn.Sequential(*rows, nn.Linear(64, 8)).eval()
    x = torch.randn(16, 64)
    model = tdpass.compress(net, None, x, pipeline=f"{steps},fuse-kernels{{measure=false}}").model
    assert [type(part) for part in model] == [*[kind, nn.Identity] * len(ends), kind]
    told = ["gelu", "silu", "relu6", "relu6", "clamp(-0.25,0.1)", "identity"]
    assert [part.activation for part in model[::2]] == told
    together = model(x)
    with layer_by_layer(model):
        alone = model(x)
    assert not torch.equal(alone, torch.zeros_like(alone))
    torch.testing.assert_close(together, alone, rtol=0, atol=apart * float(alone.abs().max()))
