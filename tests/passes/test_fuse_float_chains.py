"""Layers of floating-point factors of types of their own as one chain: the same answers, packed in pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.form import Form
from tdpass.fusing.choose import PLAIN
from tdpass.kernels import native
from tdpass.kernels.stage import Lanes, Stage
from tdpass.layers.derived import DERIVED
from tdpass.layers.factorized import Factorized, empty_layer
from tdpass.layers.float_chain import FloatChain
from tdpass.models.torch.fused import as_operator
from tdpass.site import Site

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
UNMEASURED = "fuse-kernels{measure=false},verify"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(12, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 24, 3, padding=1, padding_mode="circular"),
    )
    return nn.Sequential(
        *layers, nn.ReLU(), nn.Flatten(2), nn.Linear(36, 48), nn.ReLU(), nn.Linear(48, 36)
    ).eval()


def images() -> Tensor:
    return torch.randn(16, 12, 6, 6, generator=torch.Generator().manual_seed(1))


def made(numbers: str, last: str = UNMEASURED) -> tdpass.Artifact:
    steps = f"plan{{macs=0.35}},factorize,quantize{{numbers={numbers}}},{last}"
    formats = ["svd", "tucker2"]
    return tdpass.compress(net(), None, images(), pipeline=steps, formats=formats, cache=False, effort="fast")


@pytest.mark.parametrize("numbers", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_it_answers_as_the_layer_and_is_exported_and_saved(numbers: str, tmp_path: Path) -> None:
    artifact, plain, x = made(numbers), made(numbers, "verify"), images()
    parts = [part for part in artifact.model if isinstance(part, Factorized)]
    assert {part.format.name for part in parts} >= {"svd", "tucker2"}
    assert all(isinstance(part, FloatChain) for part in parts)
    assert artifact.report.final == plain.report.final
    with torch.no_grad():
        answer = artifact.model(x)
    torch.testing.assert_close(answer, plain.model(x), rtol=1e-4, atol=1e-5)
    program = torch.export.export(artifact.model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert sum("factor_chain" in str(node.target) for node in program.graph.nodes) == len(parts)
    torch.testing.assert_close(program.module()(x), answer, rtol=1e-5, atol=1e-6)
    artifact.save(tmp_path / "net.safetensors")
    assert torch.equal(tdpass.load(tmp_path / "net.safetensors", net())(x), plain.model(x))
    x.requires_grad_()
    artifact.model(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("pairs", [True, False])
@torch.no_grad()
def test_weights_are_packed_in_pairs_for_inputs_of_bfloat16(
    pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, pack = made("bfloat16").model, set(), Stage.pack

    def watch(stage: Stage, weight: Tensor, lanes: Lanes) -> Tensor:
        seen.add(lanes)
        return pack(stage, weight, lanes)

    monkeypatch.setattr(native, "multiplies_pairs", lambda: pairs)
    monkeypatch.setattr(Stage, "pack", watch)
    layer = next(part for part in model if isinstance(part, FloatChain) and part.lowered.linear).bfloat16()
    DERIVED.clear()  # verified in single precision, it is packed in channels
    x = torch.randn(5, layer.site.i).bfloat16()
    assert layer.activation == "relu"
    found, plain = layer(x), Factorized.forward(layer, x).relu()
    assert seen == {"pairs" if pairs else "channels"}
    # two products, each rounded to bfloat16 by the layer, the bias's sum by both
    torch.testing.assert_close(found, plain, rtol=3e-2, atol=3e-2 * float(plain.abs().max()))


@pytest.mark.parametrize(("fused", "chosen"), [(1e-6, True), (1e-3, False)])
def test_it_is_chosen_where_it_is_measured_to_be_faster(
    fused: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(layer: Factorized, one: FloatChain, like: Tensor) -> dict[str, float]:
        return {PLAIN: 1e-4, one.operator: fused}

    monkeypatch.setattr(as_operator, "_times", times)
    artifact = made("bfloat16", "fuse-kernels")
    assert any(isinstance(part, FloatChain) for part in artifact.model) == chosen
    assert any("us as one operator" in why for why in artifact.report.declined.values()) != chosen


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (Form("tensor_ring", (2, 2, 2, 2), ("bfloat16",)), "no chain"),
        (Form("tucker2", (4, 4), ("int16",)), "no floating-point"),
        (Form("tucker2", (4, 4), (), "2:4"), "a support"),
    ],
)
def test_what_the_operator_does_not_serve_says_why(form: Form, reason: str) -> None:
    site = Site("0", "conv", (16, 12, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    assert reason in FloatChain.why_not(empty_layer(site, form, torch.float32))
