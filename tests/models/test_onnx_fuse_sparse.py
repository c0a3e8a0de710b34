"""Layers of mostly zeros as fused operators in an ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from test_onnx_fuse import block
from test_onnx_fuse_integers import IMAGES, ROWS, fused_types, holds, ignore, layers, put

from tdpass.fusing.choose import Trial, Verdict
from tdpass.models.base import Batch
from tdpass.models.onnx.fused import fuse
from tdpass.models.onnx.fused.timing import Called
from tdpass.models.onnx.model import OnnxModel

pytestmark = pytest.mark.usefixtures("always")
OPS = ["SparseConvBiasRelu", "SparseConvBiasAddRelu", "SparseLinearBias"]


@pytest.mark.parametrize(
    "form",
    [
        "dense unstructured/30%",
        "dense int8 unstructured/30%",
        "dense float16 2:4",
        pytest.param("dense levels16 unstructured/30%", marks=pytest.mark.slow),
        pytest.param("dense int8/tensor columns/40%", marks=pytest.mark.slow),
    ],
)
def test_every_layer_with_a_support_is_one_operator(form: str, tmp_path: Path) -> None:
    model = put(OnnxModel.open(block()), dict.fromkeys(("first", "second", "head"), form))
    holds(model, Batch((IMAGES,)), OPS, tmp_path / "it.onnx", 1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_matrices_are_read_as_they_are_stored(rank: int, tmp_path: Path) -> None:
    model = put(OnnxModel.open(layers(rank)), dict.fromkeys(("first", "second"), "dense unstructured/30%"))
    x = ROWS if rank == 2 else ROWS[None].repeat(2, 1, 1)
    holds(model, Batch((x,)), ["SparseLinearBiasRelu", "SparseLinearBiasAdd"], tmp_path / "it.onnx", 1e-5)


@pytest.mark.parametrize(
    ("saves_more", "ops"),
    [
        ("sparse", ["SparseConvBiasAddRelu", "SparseConvBiasAdd", "SparseLinearBiasAdd"]),
        ("thin", ["ConvChain2AddRelu", "ConvChain2Add", "LinearChain2Add"]),
    ],
)
def test_beside_a_product_either_adds_to_the_other_whichever_saves_more(
    saves_more: str, ops: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(trials: Sequence[Trial[Called]], *_: object) -> Verdict:
        sparse = "sparse" in trials[0].call.spec
        return Verdict("channels", 1.0 if sparse == (saves_more == "sparse") else 2.0, 4.0)

    monkeypatch.setattr(fuse, "measured", planted)
    thin = "channel_svd_residual 3 float32 all,all,unstructured/20%"
    forms = {"first": thin, "second": thin, "head": "svd_residual 3 float32 all,all,unstructured/20%"}
    holds(put(OnnxModel.open(block()), forms), Batch((IMAGES,)), ops, tmp_path / "it.onnx", 1e-5)


def test_layers_that_are_the_smaller_dense_ones_stay_that() -> None:
    model = put(OnnxModel.open(block()), dict.fromkeys(("first", "second"), "dense rows/50%"))
    model.fuse(ignore, ignore, Batch((IMAGES,)))
    assert not any(name.startswith("Sparse") for name in fused_types(model))
