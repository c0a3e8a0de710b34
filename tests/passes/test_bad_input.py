"""What quantize, sparsify, smooth and quantize-activations are given and cannot serve, on both front ends.

One clear error, or a declined site with the reason; never numbers that are not finite.
"""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx_nets import model_of
from torch import Tensor, nn

import tdpass
from tdpass.errors import InvalidModelError, UnsupportedError, UsageError
from tdpass.models import open_model
from tdpass.models.base import Batch

FRONT_ENDS = ("torch", "onnx")
DATA_PASSES = [
    "quantize", "quantize{numbers=int4}", "sparsify", "smooth,quantize",
    *(
        f"quantize,quantize-activations{{calibration={way}}}"
        for way in ("minmax", "percentile", "mse", "kl", "dynamic")
    ),
]  # fmt: skip


def rows(count: int = 32) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1))


def net(dead: bool = False) -> nn.Sequential:
    """Linear layers; of a dead one all answers are below zero, and zero behind it."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    if dead:
        with torch.no_grad():
            made[0].weight.zero_()
            made[0].bias.fill_(-1.0)
    return made


def graph(module: nn.Sequential, opset: int = 17) -> onnx.ModelProto:
    make = onnx.helper.make_node
    nodes = [
        make("Gemm", ["x", "0.weight", "0.bias"], ["h"], transB=1),
        make("Relu", ["h"], ["r"]),
        make("Gemm", ["r", "2.weight", "2.bias"], ["y"], transB=1),
    ]
    return model_of(
        nodes, {name: value.numpy() for name, value in module.state_dict().items()}, ("N", 16), opset=opset
    )


def given(front_end: str, module: nn.Sequential | None = None, opset: int = 17) -> object:
    module = module or net()
    return copy.deepcopy(module) if front_end == "torch" else graph(module, opset)


def compressed(model: object, pipeline: str | None, data: object, budget: object = None) -> tdpass.Artifact:
    return tdpass.compress(
        model, budget, data, pipeline=pipeline, cache=False, effort="fast", strict=False,
        formats=["svd", "dense"],
    )  # fmt: skip


def answer(model: object) -> Tensor:
    found = open_model(model).run(Batch((rows(),)))
    return next(iter(found.values())) if isinstance(found, dict) else found


def notes(artifact: tdpass.Artifact) -> list[str]:
    return [note for row in artifact.report.passes for note in row.notes]


def with_one(number: float) -> Tensor:
    data = rows()
    data[3, 5] = number
    return data


UNRUN = "does not run on the given data"
FEW_BITS = ("int4", "int4/8/zero", "levels8")
BAD_DATA = {
    "NaN": (with_one(torch.nan), InvalidModelError, "NaN or infinite values; clean it first"),
    "infinite": (with_one(torch.inf), InvalidModelError, "NaN or infinite values; clean it first"),
    "width": (torch.zeros(8, 17), InvalidModelError, f"({UNRUN}|the model takes x: float32)"),
    "axes": (torch.zeros(4), InvalidModelError, f"({UNRUN}|the model takes x: float32|axis)"),
    "none": (rows(0), UsageError, "hold no number; give at least one sample"),
    "type": (torch.zeros(8, 16, dtype=torch.int64), InvalidModelError, f"({UNRUN}|is given int64)"),
}  # fmt: skip


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("pipeline", DATA_PASSES)
@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_serve_is_one_clear_error(case: str, pipeline: str, front_end: str) -> None:
    data, error, message = BAD_DATA[case]
    with pytest.raises(error, match=message):
        compressed(given(front_end), pipeline, data)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize(
    ("pipeline", "what"),
    [
        ("quantize", "second moments"),
        ("sparsify", "second moments"),
        ("quantize{rounding=nearest},quantize-activations", "ranges"),
    ],
)
def test_too_few_samples_are_said(pipeline: str, what: str, front_end: str) -> None:
    few, enough = (notes(compressed(given(front_end), pipeline, rows(count))) for count in (3, 16))
    said = f"{what} come from 3 samples; give 16 or more for {what} that hold"
    assert [note for note in few if "samples; give" in note] == [said]
    assert not [note for note in enough if "samples; give" in note]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize(
    "pipeline", [*DATA_PASSES, "sparsify{support=rows/50%}", "quantize{numbers=int4/8/zero}"]
)
def test_activations_that_never_change_are_served(pipeline: str, front_end: str) -> None:
    """A range of no width, and second moments of zero."""
    module = net(dead=True)
    with torch.no_grad():
        exact = module(rows())
    artifact = compressed(given(front_end, module), pipeline, rows())
    assert float((answer(artifact.model).detach() - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.parametrize("pipeline", ["quantize", "quantize{numbers=int4}", "quantize,quantize-activations"])
def test_a_torch_model_of_integers_given_again_is_planned_from_what_it_is(pipeline: str) -> None:
    once = compressed(net(), pipeline, rows()).model
    again = compressed(once, pipeline, rows())
    assert torch.equal(answer(again.model), answer(once))
    assert "no site changes" in notes(again)
    smaller = compressed(once, None, rows(), {"params": 0.6})
    assert smaller.report.final.params <= 0.6 * smaller.report.original.params
    assert bool(torch.isfinite(answer(smaller.model)).all())
    kept = compressed(once, "correct-bias,refit,verify", rows())
    assert {choice.form.numbers for choice in kept.plan or ()} <= {("int8",), ("int4",)}
    assert float((answer(kept.model) - answer(once)).norm()) < 0.2 * float(answer(once).norm())


@pytest.mark.parametrize("pipeline", ["quantize", "quantize,quantize-activations"])
def test_an_onnx_model_of_integers_given_again_is_planned_from_what_it_is(pipeline: str) -> None:
    once = compressed(graph(net()), pipeline, rows()).model
    again = compressed(once, pipeline, rows())
    assert torch.equal(answer(again.model), answer(once))
    assert "no site changes" in notes(again)
    smaller = compressed(once, None, rows(), {"bytes": 0.6})
    assert smaller.report.final.bytes <= 0.6 * smaller.report.original.bytes
    assert {choice.form.numbers for choice in smaller.plan} == {("int8",)}


@pytest.mark.parametrize(
    ("opset", "step", "since"),
    [
        *((opset, f"quantize{{numbers={text}}}", 11) for opset in (7, 10) for text in FEW_BITS),
        *(
            (opset, f"sparsify{{support={text}}}", 11)
            for opset in (7, 10)
            for text in ("2:4", "blocks2x2/50%")
        ),
        (10, "sparsify{support=rows/50%,fold=false}", 11),
        (18, "quantize{numbers=float8_e4m3}", 19),
        (10, "quantize,quantize-activations{calibration=dynamic}", 11),
    ],
)  # fmt: skip
def test_what_an_opset_does_not_read_is_declined_site_by_site(opset: int, step: str, since: int) -> None:
    artifact = compressed(graph(net(), opset), step, rows())
    assert set(artifact.report.declined) == {"0", "2"}
    words = f"from opset {since} on, and the model has {opset}"
    assert all(words in reason for reason in artifact.report.declined.values())
    assert np.isfinite(answer(artifact.model).numpy()).all()
    other = {choice.form.numbers for choice in artifact.plan or ()}
    assert other <= {("int8",)}


@pytest.mark.parametrize("opset", [7, 10])
def test_a_budget_on_bytes_is_planned_over_what_an_opset_reads(opset: int) -> None:
    artifact = compressed(graph(net(), opset), None, rows(), {"bytes": 0.25})
    assert {choice.form.numbers for choice in artifact.plan} <= {(), ("int8",)}
    assert any(
        "int4 is not offered: operators read int4 from opset 11 on" in note for note in notes(artifact)
    )
    assert any("unstructured/50% is not offered" in note for note in notes(artifact))
    assert artifact.report.final.bytes <= 0.25 * artifact.report.original.bytes


@pytest.mark.parametrize("opset", [9, 12])
def test_an_opset_without_quantize_and_dequantize_by_channel_says_what_to_do(opset: int) -> None:
    with pytest.raises(UnsupportedError, match=f"opset {opset}, in which .*convert it to opset 13"):
        compressed(graph(net(), opset), "quantize,quantize-activations", rows())
    assert compressed(graph(net(), opset), "quantize", rows()).report.final.bytes
