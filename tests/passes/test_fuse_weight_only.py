"""Linear layers of numbers of few bits run as one operator.

Answers are the same, the choice is by measured times, and files are as before.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.formats import Layer
from tdpass.fusing.choose import PLAIN
from tdpass.kernels import native
from tdpass.kernels.activation import activate
from tdpass.layers.factorized import Factorized
from tdpass.layers.weight_only import WeightOnly
from tdpass.models.torch.fused import as_operator

SERVED = [
    "numbers=int8",
    "numbers=int4/16,beside=4",
    "numbers=int4/16/zero",
    "numbers=float8_e4m3",
    "numbers=levels16",
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            *(
                f"numbers={text}"
                for text in (
                    "int8/tensor",
                    "int8/zero",
                    "int4",
                    "int4/32",
                    "float8_e4m3/16",
                    "float8_e4m3/tensor",
                )
            ),
            "numbers=int8,beside=4",
        )
    ),
]
pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
UNMEASURED = "fuse-kernels{measure=false}"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)).eval()


def rows() -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


def made(options: str, last: str = UNMEASURED) -> tdpass.Artifact:
    return tdpass.compress(net(), None, rows(), pipeline=f"quantize{{{options}}},{last}", cache=False)


@pytest.mark.parametrize("options", SERVED)
def test_it_answers_as_the_layer_that_it_was_and_is_saved_as_that(options: str, tmp_path: Path) -> None:
    plain, fused = made(options, "verify").model, made(options).model
    kinds = [type(part) for part in fused]
    assert WeightOnly in kinds
    with torch.no_grad():
        torch.testing.assert_close(fused(rows()), plain(rows()), rtol=1e-4, atol=1e-5)
        parts = [part for part in fused if isinstance(part, WeightOnly)]
        torch.testing.assert_close(
            parts[0].packed_call(rows()),
            activate(Factorized.forward(parts[0], rows()), parts[0].activation),
            rtol=1e-4,
            atol=1e-5,
        )
    assert fused.state_dict().keys() == plain.state_dict().keys()
    fused_artifact = made(options)
    assert fused_artifact.report.final == made(options, "verify").report.final
    fused_artifact.save(tmp_path / "net.safetensors")
    torch.testing.assert_close(tdpass.load(tmp_path / "net.safetensors", net())(rows()), plain(rows()))


def test_it_exports_compiles_and_trains_as_the_layer_that_it_is() -> None:
    model = made("numbers=int4/32").model
    x = rows().requires_grad_()
    model(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    with torch.no_grad():
        exported = torch.export.export(model, (rows(),)).module()
        torch.testing.assert_close(exported(rows()), model(rows()), rtol=1e-4, atol=1e-5)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(rows()), model(rows()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("levels", "codes"),
    [
        (0.3 * torch.arange(-7.0, 8.0), torch.int32),  # four bits to a code
        (0.1 * torch.arange(-63.0, 64.0), torch.int8),
        (torch.tensor([-64.0, -16, -1, 0, 2, 8, 32]) / 3, torch.int8),  # powers of two
        (torch.tensor([-0.5, -0.1, 0.0, 0.3, 2**0.5]), torch.float32),
    ],
)
@torch.no_grad()
def test_levels_that_are_multiples_of_a_step_are_whole_numbers(levels: Tensor, codes: torch.dtype) -> None:
    module = net()
    for layer in (module[0], module[2]):
        layer.weight.copy_(levels[torch.randint(0, len(levels), layer.weight.shape)])
    pipeline = f"quantize{{numbers=levels{len(levels)}}},{UNMEASURED}"
    model = tdpass.compress(module, None, rows(), pipeline=pipeline, cache=False).model
    assert [part.packed()[0].dtype for part in model if isinstance(part, WeightOnly)] == [codes] * 2
    torch.testing.assert_close(model(rows()), module(rows()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fused", "chosen"), [(1e-6, True), (1e-3, False)])
def test_it_is_chosen_where_it_is_measured_to_be_faster(
    fused: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(layer: Factorized, one: WeightOnly, like: Tensor) -> dict[str, float]:
        return {PLAIN: 1e-4, "weight_only_linear": fused}

    monkeypatch.setattr(as_operator, "_times", times)
    artifact = made("numbers=int8", "fuse-kernels")
    assert any(isinstance(part, WeightOnly) for part in artifact.model) == chosen
    said = [why for why in artifact.report.declined.values() if "us as one operator" in why]
    assert bool(said) != chosen


def test_times_are_measured_once_and_kept() -> None:
    layer = made("numbers=int8", "verify").model[0]
    one, like = WeightOnly.of(layer), torch.empty(5, 32, device="meta")
    first = as_operator._times(layer, one, like)
    assert all(seconds > 0 for seconds in first.values())
    assert as_operator._times(layer, one, like) == first


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("numbers=int16", "no numbers of 4 or 8 bits"),
        ("numbers=int4/4", "multiples of 8"),
    ],
)
def test_what_the_operator_does_not_serve_stays_with_the_reason(options: str, reason: str) -> None:
    artifact = made(options)
    assert not any(isinstance(part, WeightOnly) for part in artifact.model)
    assert any(reason in why for why in artifact.report.declined.values())


def test_convolutions_are_not_served() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    x = torch.randn(4, 3, 6, 6)
    model = tdpass.compress(module, None, x, pipeline="quantize", cache=False).model
    layer = model[0].layer()
    assert isinstance(layer, Layer)
    assert "no linear layer" in WeightOnly.why_not(layer)
