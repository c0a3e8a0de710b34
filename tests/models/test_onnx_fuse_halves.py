"""Chains of weights that a form stores as bfloat16 as fused operators in an ONNX model."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from test_onnx_fuse import block
from test_onnx_fuse_integers import IMAGES, ROWS, fused_types, holds, ignore, layers, put, run_file

import tdpass
from tdpass.kernels import native
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel
from tdpass.models.onnx.operators import fused as operators
from tdpass.models.onnx.sites.parameters import HOLDS

pytestmark = pytest.mark.usefixtures("always")
FORMS = {"first": "tucker2 5x4 bfloat16", "second": "tucker2 4x5 bfloat16", "head": "svd 3 bfloat16"}
OPS = ["Bfloat16ConvChain3BiasRelu", "Bfloat16ConvChain3BiasAddRelu", "Bfloat16LinearChain2Bias"]


def test_every_chain_is_one_operator(tmp_path: Path) -> None:
    model = put(OnnxModel.open(block()), FORMS)
    assert model.grain() == 0.0
    holds(model, Batch((IMAGES,)), OPS, tmp_path / "it.onnx", 1e-2)
    steps = 2.0**-8 if native.multiplies_pairs() else 0.0
    assert model.grain() == pytest.approx(steps * len(OPS) ** 0.5)


@pytest.mark.parametrize("rank", [2, 3])
def test_matrices_are_laid_out_for_the_operator(rank: int, tmp_path: Path) -> None:
    model = put(OnnxModel.open(layers(rank)), dict.fromkeys(("first", "second"), "svd 12 bfloat16"))
    x = ROWS if rank == 2 else ROWS[None].repeat(2, 1, 1)
    ops = ["Bfloat16LinearChain2BiasRelu", "Bfloat16LinearChain2BiasAdd"]
    holds(model, Batch((x,)), ops, tmp_path / "it.onnx", 1e-2)


@pytest.mark.parametrize("pairs", [True, False])
def test_they_are_chosen_checked_saved_loaded_and_run(
    pairs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "multiplies_pairs", lambda: pairs)
    data = torch.randn(16, 8, 10, 9, generator=torch.Generator().manual_seed(1))
    steps = "plan{macs=0.6},factorize,quantize{numbers=bfloat16},fuse-kernels,verify"
    made = tdpass.compress(block(), None, data, pipeline=steps, cache=False, effort="fast")
    made.save(tmp_path / "it.onnx")
    ops = fused_types(OnnxModel.open(tmp_path / "it.onnx"))
    assert any(name.startswith("Bfloat16") for name in ops)
    said = [line for row in made.report.passes for line in row.notes if "round what they read" in line]
    assert bool(said) is pairs
    assert 0 < made.report.checks["relative_difference"] < 1
    (plain,) = OnnxModel.open(made.model).run(Batch((data,))).values()
    for registered in (True, False):
        (found,) = run_file(tmp_path / "it.onnx", {"x": data.numpy()}, registered=registered)
        assert torch.allclose(torch.from_numpy(found), plain, atol=1e-2 * float(plain.abs().max()))


@pytest.mark.parametrize("kept", [True, False])
def test_only_a_form_says_that_inputs_may_be_rounded_as_weights_are(kept: bool) -> None:
    """A graph that casts weights of bfloat16 has not said so; one that a form wrote has."""
    proto = put(OnnxModel.open(block()), FORMS).unwrap()
    assert isinstance(proto, onnx.ModelProto)
    for entry in proto.graph.value_info if not kept else ():
        for place in reversed(range(len(entry.metadata_props))):
            if entry.metadata_props[place].key == HOLDS:
                del entry.metadata_props[place]
    for tensor in proto.graph.initializer if not kept else ():
        del tensor.metadata_props[:]
    model = OnnxModel.open(proto)
    assert model.fuse(ignore, ignore, Batch((IMAGES,))) is kept
    assert fused_types(model) == (OPS if kept else [])
