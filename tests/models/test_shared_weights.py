"""Layers that share a weight, with biases that are the same, differ, or are missing in some."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.models import open_model

BIASES = {
    "none": (),
    "one object": ("a", "b", "same"),
    "each its own": ("a", "b"),
    "the first": ("a",),
    "the second": ("b",),
}
FACTORED = {"linear": "svd", "conv": "channel_svd"}


class Twins(nn.Module):
    """Two layers of one weight; what lies between them leaves torch where it is `cut`."""

    def __init__(self, kind: str, biased: tuple[str, ...], cut: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = (lambda: nn.Linear(16, 16)) if kind == "linear" else (lambda: nn.Conv1d(16, 16, 3, padding=1))
        self.a, self.b, self.cut = make(), make(), cut
        with torch.no_grad():
            u, s, v = torch.linalg.svd(self.a.weight.flatten(1), full_matrices=False)
            self.a.weight.copy_(
                ((u * s * torch.exp(-torch.arange(16) / 3)) @ v).reshape(self.a.weight.shape) * 4
            )
        self.b.weight = self.a.weight
        if "same" in biased:
            self.b.bias = self.a.bias
        for name, layer in (("a", self.a), ("b", self.b)):
            if name not in biased:
                layer.register_parameter("bias", None)
            elif layer.bias is not None:
                nn.init.normal_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(torch.from_numpy(h.numpy()).clone() if self.cut else h)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("biased", BIASES)
@pytest.mark.parametrize("kind", FACTORED)
def test_losses_repair_and_counts_are_those_of_every_layer(
    kind: str, biased: str, cut: bool, folder: Path
) -> None:
    net = Twins(kind, BIASES[biased], cut).eval()
    x = torch.randn(40, *((16,) if kind == "linear" else (16, 9)), generator=torch.Generator().manual_seed(1))
    planned = tdpass.compress(
        net,
        {"params": 0.75},
        x,
        formats=[FACTORED[kind]],
        divergence="mse",
        pipeline="plan,factorize,verify",
        cache=False,
    )
    assert [choice.site for choice in planned.plan if not choice.kept_dense] == ["a"]
    assert planned.report.checks["divergence"] == pytest.approx(planned.plan.loss, rel=1e-3)
    whole = tdpass.compress(net, {"params": 0.75}, x, formats=[FACTORED[kind]], divergence="mse", cache=False)
    assert whole.report.checks["divergence"] <= planned.report.checks["divergence"] * (1 + 1e-5)
    held = sum(parameter.numel() for parameter in whole.model.parameters())
    assert held == whole.report.final.params <= 0.75 * whole.report.original.params
    assert whole.report.original.params == sum(parameter.numel() for parameter in net.parameters())
    assert whole.report.checks["divergence"] == pytest.approx(
        tdpass.verify(net, whole.model, x, divergence="mse")["divergence"], rel=1e-4
    )
    whole.save(folder / "small.safetensors")
    loaded = tdpass.load(folder / "small.safetensors", copy.deepcopy(net))
    with torch.no_grad():
        assert torch.allclose(loaded(x), whole.model(x), atol=1e-6)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == held


@pytest.mark.parametrize("biased", BIASES)
def test_what_is_put_in_a_site_can_be_read_back(biased: str) -> None:
    net = Twins("linear", BIASES[biased], cut=False).eval()
    model = open_model(net, torch.randn(4, 16))
    site = model.sites()[0]
    factors = FORMATS.get("svd").factorize(model.weight("a"), site, (3,))
    for bias in (model.bias("a"), torch.arange(16.0), model.bias("a")):
        model.replace("a", Layer(site, Form("svd", (3,)), factors, bias))
        found = model.layer("a")
        assert found is not None
        assert (found.bias is None) == (bias is None)
        assert bias is None or torch.allclose(found.bias, bias, atol=1e-6)
