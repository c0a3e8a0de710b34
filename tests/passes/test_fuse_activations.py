"""Activations behind a layer of encoded factors move into its operator, however factors are stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdpass
from tdpass.kernels import native
from tdpass.layers.encoded import EncodedCall
from tdpass.layers.float_chain import FloatChain
from tdpass.layers.fused import layer_by_layer
from tdpass.layers.integer_chain import IntegerChain
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
    steps: str, kind: type[EncodedCall], apart: float
) -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(16, 64)
    model = tdpass.compress(net, None, x, pipeline=f"{steps},fuse-kernels{{measure=false}}").model
    assert [type(part) for part in model] == [kind, nn.Identity, kind, nn.Identity, kind]
    assert [part.activation for part in model[::2]] == ["gelu", "silu", "identity"]
    together = model(x)
    with layer_by_layer(model):
        alone = model(x)
    assert not torch.equal(alone, torch.zeros_like(alone))
    torch.testing.assert_close(together, alone, rtol=0, atol=apart * float(alone.abs().max()))
