"""Layers with a support run as one operator: the same answers, chosen by measured times, saved as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_layers import SITES, input_of, module_of
from torch import nn

import tdpass
from tdpass.fusing.choose import PLAIN
from tdpass.kernels import native
from tdpass.layers.sparse import SparseLayer
from tdpass.models.torch.fused import as_operator
from tdpass.models.torch.fused.deployable import fused as deployable

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())

FORMS = [
    "dense unstructured/30%",
    "dense int8 2:4",
    "dense levels16 blocks4x4/25%",
    "dense bfloat16 columns/30%",
    "{}_residual 4 float32 all,all,unstructured/5%",
    "{}_residual 4 float16,float16,int8 all,all,2:4",
]


def served(kind: str, text: str) -> bool:
    return not (kind != "signal" and text.startswith("dense bfloat16")) or kind == "image"


CASES = [(kind, text) for kind in SITES for text in FORMS if served(kind, text)]


@pytest.mark.parametrize(("kind", "text"), CASES)
@torch.no_grad()
def test_it_answers_as_the_layer_that_it_was_here_and_deployed(kind: str, text: str) -> None:
    plain, x = module_of(kind, text), input_of(kind)
    made = as_operator.as_operator(plain, None)
    assert not isinstance(made, str), made
    assert isinstance(made.call, SparseLayer)
    wanted, alone = plain(x), nn.Sequential(made.call)
    with torch.profiler.profile() as seen:
        made.call.packed_call(x)
    called = [event.name for event in seen.events() if event.name.startswith("tdpass::")]
    assert called == ["tdpass::sparse_linear" if kind == "linear" else "tdpass::sparse_conv2d"]
    torch.testing.assert_close(alone(x), wanted, rtol=1e-4, atol=1e-4)
    made.call.activation = "relu"
    package, count = deployable(alone)
    assert count == 1
    torch.testing.assert_close(package(x), wanted.relu(), rtol=1e-4, atol=1e-4)
    half = made.call.bfloat16()
    torch.testing.assert_close(half(x.bfloat16()).float(), wanted.relu(), rtol=0.05, atol=0.2)


def test_calls_of_few_rows_share_what_is_packed_and_so_do_calls_of_many() -> None:
    layer = SparseLayer.of(module_of("linear", FORMS[0]))
    few, some, many, more = (layer.packed(rows)[0] for rows in (1, 15, 16, 500))
    assert few is some
    assert many is more


@torch.no_grad()
def test_padding_that_is_no_zeros_is_kept() -> None:
    plain, x = module_of("image", FORMS[0], "reflect", (1, 1, 0, 2)), input_of("image")
    torch.testing.assert_close(SparseLayer.of(plain).eval()(x), plain(x), rtol=1e-4, atol=1e-4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)).eval()


def pruned(last: str) -> tdpass.Artifact:
    pipeline = f"sparsify{{support=unstructured/20%}},{last}"
    return tdpass.compress(net(), None, torch.randn(5, 32), pipeline=pipeline, cache=False, progress=False)


@pytest.mark.parametrize(("fused", "chosen"), [(1e-6, True), (1e-3, False)])
def test_it_is_chosen_where_it_is_measured_to_be_faster(
    fused: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(as_operator, "_times", lambda *_: {PLAIN: 1e-4, SparseLayer.operator: fused})
    artifact = pruned("fuse-kernels")
    assert [type(part) is SparseLayer for part in artifact.model[::2]] == [chosen] * 2
    said = [why for why in artifact.report.declined.values() if "us as one operator" in why]
    assert len(said) == (0 if chosen else 2)


def test_times_are_measured() -> None:
    plain = module_of("linear", FORMS[0])
    times = as_operator._times(plain, SparseLayer.of(plain), torch.empty(5, 64, device="meta"))
    assert set(times) == {PLAIN, "sparse"}
    assert all(seconds > 0 for seconds in times.values())


def test_it_is_saved_trained_exported_and_compiled_as_the_layer_that_it_is(tmp_path: Path) -> None:
    artifact, x = pruned("fuse-kernels{measure=false}"), torch.randn(5, 32)
    model = artifact.model
    assert isinstance(model[0], SparseLayer)
    artifact.save(tmp_path / "net.safetensors")
    with torch.no_grad():
        answer = model(x)
        torch.testing.assert_close(tdpass.load(tmp_path / "net.safetensors", net())(x), answer)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), answer)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), answer)
    model(x.requires_grad_()).sum().backward()
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("linear", "svd 4 unstructured/30%", "no weight with a support"),
        ("linear", "dense rows/25%", "smaller dense layer"),
    ],
)
def test_what_it_does_not_serve_stays_with_the_reason(kind: str, text: str, reason: str) -> None:
    made = as_operator.as_operator(module_of(kind, text), None)
    assert isinstance(made, str)
    assert reason in made
