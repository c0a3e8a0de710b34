"""Convolutions of levels run as one operator: the same answers, chosen by measured times, saved as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_layers import input_of, module_of
from torch import nn

import tdpass
from tdpass.fusing.choose import PLAIN
from tdpass.kernels import native
from tdpass.layers.level_conv import LevelConv
from tdpass.models.torch.fused import as_operator
from tdpass.models.torch.fused.deployable import fused as deployable

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


@pytest.mark.parametrize("kind", ["image", "signal"])
@pytest.mark.parametrize("levels", [3, 16, 17, 256])
@torch.no_grad()
def test_it_answers_as_the_layer_that_it_was_here_and_deployed(levels: int, kind: str) -> None:
    plain, x = module_of(kind, f"dense levels{levels}"), input_of(kind)
    made = as_operator.as_operator(plain, None)
    assert not isinstance(made, str), made
    assert isinstance(made.call, LevelConv)
    wanted, alone = plain(x), nn.Sequential(made.call)
    torch.testing.assert_close(alone(x), wanted, rtol=1e-4, atol=1e-4)
    made.call.activation = "relu"
    package, count = deployable(alone)
    assert count == 1
    torch.testing.assert_close(package(x), wanted.relu(), rtol=1e-4, atol=1e-4)
    half = made.call.bfloat16()
    torch.testing.assert_close(half(x.bfloat16()).float(), wanted.relu(), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("levels", [16, 64])
def test_a_weight_has_half_a_byte_or_one_and_never_four(levels: int) -> None:
    layer = LevelConv.of(module_of("image", f"dense levels{levels}"))
    held = sum(tensor.numel() * tensor.element_size() for tensor in layer.packed())
    assert held == layer.site.weights * (0.5 if levels == 16 else 1) + 4 * levels


@torch.no_grad()
def test_padding_that_is_no_zeros_is_kept() -> None:
    plain, x = module_of("image", "dense levels16", "reflect", (1, 1, 0, 2)), input_of("image")
    torch.testing.assert_close(LevelConv.of(plain).eval()(x), plain(x), rtol=1e-4, atol=1e-4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, groups=2)
    ).eval()


def quantized(last: str) -> tdpass.Artifact:
    pipeline = f"quantize{{numbers=levels16}},{last}"
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(1))
    return tdpass.compress(net(), None, x, pipeline=pipeline, cache=False, progress=False)


@pytest.mark.parametrize(("one", "chosen"), [(1e-6, True), (1e-3, False)])
def test_it_is_chosen_where_it_is_measured_to_be_faster(
    one: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(as_operator, "_times", lambda *_: {PLAIN: 1e-4, LevelConv.operator: one})
    artifact = quantized("fuse-kernels")
    assert [type(artifact.model[at]) is LevelConv for at in (0, 2, 3)] == [chosen, chosen, False]
    said = [why for why in artifact.report.declined.values() if "us as one operator" in why]
    assert len(said) == (0 if chosen else 2)
    assert any("no dense convolution of one group" in why for why in artifact.report.declined.values())


def test_it_is_saved_trained_exported_and_compiled_as_the_layer_that_it_is(tmp_path: Path) -> None:
    artifact, x = quantized("fuse-kernels{measure=false}"), torch.randn(2, 8, 9, 9)
    model = artifact.model
    assert isinstance(model[0], LevelConv)
    artifact.save(tmp_path / "net.safetensors")
    with torch.no_grad():
        answer = model(x)
        torch.testing.assert_close(tdpass.load(tmp_path / "net.safetensors", net())(x), answer)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), answer)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), answer)
    model(x.requires_grad_()).sum().backward()
    assert float(x.grad.abs().sum()) > 0
