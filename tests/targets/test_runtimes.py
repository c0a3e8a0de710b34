"""What every registered runtime promises: the layer's own numbers, or None."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tdpass.form import DENSE, Form
from tdpass.formats import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models import Batch, open_model
from tdpass.site import Site
from tdpass.targets.layers import example_input, make_layer
from tdpass.targets.runtimes import RUNTIMES

SITES = (
    Site("conv", "conv", (16, 8, 3, 3), (2, 1), ((0, 1), (1, 1)), (1, 1), True, extents=(((9, 8), (4, 8)),)),
    Site("pointwise", "conv", (8, 16, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), extents=(((5, 6), (5, 6)),)),
    Site("conv1d", "conv", (8, 8, 5), (1,), ((2, 2),), (1,), True, extents=(((15,), (15,)),)),
    Site(
        "grouped",
        "conv",
        (8, 4, 3, 3),
        (1, 1),
        ((1, 1), (1, 1)),
        (1, 1),
        True,
        extents=(((6, 5), (6, 5)),),
        groups=2,
    ),
    Site(
        "transposed",
        "conv_transpose",
        (8, 6, 3, 3),
        (2, 2),
        ((1, 0), (1, 0)),
        (1, 1),
        True,
        extents=(((4, 3), (8, 6)),),
    ),
    Site("tokens", "linear", (16, 24), bias=True, extents=(((7,), (7,)),)),
    Site("vector", "linear", (8, 16), extents=(((1,), (1,)),)),
)
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if RUNTIMES.get(name).on_demand else name
    for name in RUNTIMES.names()
]


def forms(site: Site) -> list[Form]:
    """Dense, fewer channels, and a middle rank of every format."""
    formats = [fmt for fmt in FORMATS if fmt.offered and fmt.fits(site)]
    narrow = [Form("dense", (), inputs=5, outputs=6)] if site.groups == 1 else []
    middle = [Form(fmt.name, fmt.ranks(site)[len(fmt.ranks(site)) // 2]) for fmt in formats]
    return [DENSE, *narrow, *middle, *(replace(form, numbers=("int8",)) for form in (DENSE, *middle[:1]))]


CASES = [(site, form) for site in SITES for form in forms(site)]


@pytest.mark.parametrize(("site", "form"), CASES, ids=[f"{site.name}-{form.format}" for site, form in CASES])
@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_gives_the_numbers_of_the_layer_or_declines(name: str, site: Site, form: Form) -> None:
    runtime = RUNTIMES.get(name)
    if not runtime.available():
        pytest.skip(f"{name} is not installed")
    layer = make_layer(site, form, torch.float32)
    call = runtime.prepare(layer, 3, 1)
    if call is None:
        return
    x = example_input(layer, 3)
    expected = layer(x)
    for _ in range(2):
        answer = call()
        assert isinstance(answer, Tensor)
        assert answer.shape == expected.shape
        within = {"rtol": runtime.rounding, "atol": runtime.rounding * float(expected.abs().max())}
        assert torch.allclose(answer.cpu(), expected, **within)


@pytest.mark.parametrize("name", NAMES)
def test_every_runtime_serves_something_and_says_its_version(name: str) -> None:
    runtime = RUNTIMES.get(name)
    if not runtime.available():
        pytest.skip(f"{name} is not installed")
    assert runtime.version()
    assert runtime.families
    assert any(
        runtime.prepare(make_layer(site, form, torch.float32), 1, 1) is not None for site, form in CASES
    )


@pytest.mark.parametrize(
    ("dtype", "serve", "rounding"),
    [(torch.bfloat16, ("eager",), 1e-2), (torch.float64, ("eager", "onnxruntime"), 1e-9)],
    ids=str,
)
@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_a_type_is_served_as_it_is_or_declined(
    name: str, dtype: torch.dtype, serve: tuple[str, ...], rounding: float
) -> None:
    runtime = RUNTIMES.get(name)
    if not runtime.available():
        pytest.skip(f"{name} is not installed")
    layer = make_layer(next(site for site in SITES if not site.axes), DENSE, dtype)
    call = runtime.prepare(layer, 2, 1)
    assert (call is not None) == (name in serve)
    if call is not None:
        answer = call()
        assert answer.dtype is dtype
        torch.testing.assert_close(answer, layer(example_input(layer, 2)), rtol=rounding, atol=rounding)


def test_openvino_says_in_which_precision_it_computes_by_default() -> None:
    pytest.importorskip("openvino")
    plain, chosen = RUNTIMES.get("openvino"), RUNTIMES.get("openvino_default")
    precision = chosen.version().removeprefix(f"{plain.version()} ")
    assert precision in ("float", "f32", "bfloat16", "bf16", "float16", "f16")
    layer = make_layer(SITES[0], DENSE, torch.float32)
    exact, errors = layer(example_input(layer, 3)), []
    for runtime in (plain, chosen):
        call = runtime.prepare(layer, 3, 1)
        assert call is not None
        errors.append(float((call() - exact).abs().max()))
    assert (errors[1] > 10 * errors[0]) == ("16" in precision)


def test_a_graph_that_a_runtime_refuses_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdpass.targets.sessions.onnx.layer_graph", lambda *_: b"no model")
    layer = make_layer(SITES[0], DENSE, torch.float32)
    for name in ("onnxruntime", "openvino"):
        if RUNTIMES.get(name).available():
            assert RUNTIMES.get(name).prepare(layer, 1, 1) is None


def test_whole_models_run_where_their_front_end_says(residual: nn.Module, images: Tensor) -> None:
    batch = Batch((images[:2],))
    assert RUNTIMES.get("onnxruntime").prepare_model(open_model(residual), batch, 1) is None
    call = RUNTIMES.get("eager").prepare_model(open_model(residual), batch, 1)
    assert call is not None
    with torch.no_grad():
        answer, expected = call(), residual(images[:2])
    assert isinstance(answer, Tensor)
    assert torch.allclose(answer, expected, atol=1e-4)


def test_noise_layers_keep_the_size_of_activations() -> None:
    for site, form in CASES:
        if form.format in ("dense", "tucker2", "svd"):
            layer: Layer = make_layer(site, form, torch.float32)
            assert 0.05 < float(layer(example_input(layer, 4)).std()) < 20
