"""Layers of whole numbers and recurrent cells as fused operators in an ONNX model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import model_of, node, weight
from test_onnx_fuse import block
from test_onnx_recurrent import AFTER, Case

import tdpass
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.kernels.native import onnx_ops_path
from tdpass.models.abilities import Range
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel
from tdpass.models.onnx.operators.fused import DOMAIN

pytestmark = pytest.mark.usefixtures("always")
ROWS = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 8, 10, 9, generator=torch.Generator().manual_seed(0))


def ignore(*_: str) -> None:
    pass


def put(model: OnnxModel, forms: dict[str, str]) -> OnnxModel:
    """The model with sites in these forms, as text."""
    for site in model.sites():
        if site.name in forms:
            form = Form.parse(forms[site.name])
            factors = FORMATS.get(form.format).factorize(model.weight(site.name), site, form.rank)
            plain = Layer(site, Form(form.format, form.rank), factors, model.bias(site.name))
            model.replace(site.name, plain.to(torch.float32).stored(form))
    return model


def fused_types(model: OnnxModel) -> list[str]:
    return [each.op_type for each in model._built.graph if each.domain == DOMAIN]


def run_file(path: Path, inputs: dict[str, np.ndarray], *, registered: bool) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(onnx_ops_path()))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def holds(
    model: OnnxModel, batch: Batch, wanted: list[str], path: Path, tolerance: float, dropped: int = 0
) -> None:
    """Fuse, and hold the result to what it was: in memory, in a file, opened again, without the library.

    `dropped` are numbers that nodes read and the operators do not, such as zero points of zero.
    """
    before, params, size = model.run(batch), model.params(), model.bytes()
    assert model.fuse(ignore, lambda name, why: pytest.fail(f"{name}: {why}"), batch)
    model.check()
    assert fused_types(model) == wanted
    assert model.params() == params - dropped
    assert model.bytes() <= size + 4 * 256  # a bias of zeros, or the scale of a matrix once per output
    model.save(path, {})
    named = {name: tensor.numpy() for name, tensor in model.named_inputs(batch).items()}
    made = [
        [each.numpy() for each in model.run(batch).values()],
        [each.numpy() for each in OnnxModel.open(path).run(batch).values()],
        run_file(path, named, registered=True),
        run_file(path, named, registered=False),
    ]
    for answers in made:
        for answer, exact in zip(answers, before.values(), strict=True):
            assert answer.shape == tuple(exact.shape)
            assert np.abs(answer - exact.numpy()).max() <= tolerance * max(1.0, float(exact.abs().max()))


def layers(rank: int, opset: int = 21) -> onnx.ModelProto:
    """Two linear layers with biases, an activation and a sum, on matrices or on three axes."""
    nodes = [
        node("Gemm", "x first.weight first.bias", "a", transB=1), node("Relu", "a", "b"),
        node("Gemm", "b second.weight second.bias", "c", transB=1), node("Add", "c x", "y"),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    constants = {"first.weight": weight(96, 64, rng=rng), "second.weight": weight(64, 96, rng=rng)}
    if rank == 3:
        nodes = [
            node("MatMul", "x first.weight", "h"),
            node("Add", "h first.bias", "a"),
            node("Relu", "a", "b"),
            node("MatMul", "b second.weight", "g"),
            node("Add", "g second.bias", "c"),
            node("Add", "c x", "y"),
        ]
        constants = {name: np.ascontiguousarray(array.T) for name, array in constants.items()}
    constants |= {"first.bias": weight(96, rng=rng), "second.bias": weight(64, rng=rng)}
    return model_of(nodes, constants, ("N", 64) if rank == 2 else ("N", "T", 64), opset=opset)


@pytest.mark.parametrize("rank", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("form", "bits"),
    [
        *(("dense int8" + rest, 8) for rest in ("", "/32", "/tensor", "/zero", "/16/zero", "/tensor/zero")),
        *(("dense int4" + rest, 4) for rest in ("/32", "/16/zero")),
    ],
)
def test_layers_of_few_bits(form: str, bits: int, rank: int, tmp_path: Path) -> None:
    model = put(OnnxModel.open(layers(rank)), dict.fromkeys(("first", "second"), form))
    x = ROWS if rank == 2 else ROWS[None].repeat(2, 1, 1)
    last = "BiasAdd" if bits == 8 else "Bias"  # no size is known of what MatMulNBits makes
    name = f"WeightOnlyLinear{bits}{'Zeros' * form.endswith('zero')}"
    ops = [f"{name}BiasRelu", f"{name}{last}"]
    holds(model, Batch((x,)), ops, tmp_path / "it.onnx", 1e-5 if bits == 8 else 1e-3)


@pytest.mark.parametrize("rest", ["", ",beside=4"])
def test_types_follow_from_what_layers_of_few_bits_say_they_compute(rest: str) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Add", "h x", "s"), node("Clip", "s low high", "y")]
    bounds = {"low": np.float32(-1), "high": np.float32(1.5)}
    dense = model_of(nodes, {"w": weight(64, 64), **bounds}, ("N", 64))
    passes = f"quantize{{numbers=int4/32{rest}}}"
    made = tdpass.compress(dense, None, ROWS, pipeline=f"{passes},fuse-kernels", cache=False).model
    assert {each.domain for each in made.graph.node} >= {DOMAIN}
    del made.graph.value_info[:]
    typed = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    assert types["s"] == onnx.TensorProto.FLOAT
    plain = tdpass.compress(dense, None, ROWS, pipeline=passes, cache=False).model
    assert tdpass.verify(plain, made, ROWS)["relative_difference"] < 1e-3


def test_a_product_of_thin_factors_beside_few_bits(tmp_path: Path) -> None:
    made = tdpass.compress(layers(2), None, ROWS, pipeline="quantize{numbers=int4/32,beside=4}", cache=False)
    model = OnnxModel.open(made.model)
    ops = ["WeightOnlyLinear4LowRankBiasRelu", "WeightOnlyLinear4LowRankBias"]
    holds(model, Batch((ROWS,)), ops, tmp_path / "it.onnx", 1e-3)


@pytest.mark.parametrize(
    ("form", "why"),
    [("dense int4", "no groups"), ("dense levels16", "a table"), ("dense int4/16", "")],
)
def test_which_layers_of_few_bits_are_served(form: str, why: str) -> None:
    model = put(OnnxModel.open(layers(2)), dict.fromkeys(("first", "second"), form))
    assert model.fuse(ignore, ignore, Batch((ROWS,))) is (why == "")


def in_integers(model: OnnxModel, batch: Batch) -> OnnxModel:
    """The model with activations in eight bits."""
    names = model.activations()
    seen = model.watch(names, batch)
    model.hold_integers({name: Range(float(seen[name].min()), float(seen[name].max())) for name in names})
    return model


def test_chains_that_read_and_make_bytes(tmp_path: Path) -> None:
    forms = {"first": "tucker2 5x4 int8", "second": "tucker2 4x5 int8", "head": "svd 3 int8"}
    batch = Batch((IMAGES,))
    model = in_integers(put(OnnxModel.open(block()), forms), batch)
    ops = ["Int8ConvChain3Bytes", "Int8ConvChain3Bytes", "Int8LinearChain2"]
    holds(model, batch, ops, tmp_path / "it.onnx", 0.02)


def test_grids_that_differ_between_layers_are_kept() -> None:
    """Codes between two layers pass through one grid; where reader and maker disagree there is no chain."""
    batch = Batch((IMAGES,))
    model = in_integers(
        put(OnnxModel.open(block()), {"first": "tucker2 5x4 int8", "head": "svd 3 int8"}), batch
    )
    proto = model.unwrap()
    assert isinstance(proto, onnx.ModelProto)
    reader = next(
        each for each in proto.graph.node if each.op_type == "DequantizeLinear" and "conv" in each.input[0]
    )
    reader.input[1] = next(t.name for t in proto.graph.initializer if t.name.endswith("x_scale"))
    again = OnnxModel.open(proto)
    before = again.run(batch)
    again.fuse(ignore, ignore, batch)
    (answer,), (exact,) = again.run(batch).values(), before.values()
    assert "Int8ConvChain3Bytes" not in fused_types(again)
    assert torch.allclose(answer, exact, atol=0.02 * float(exact.abs().max()))


CELLS = {
    "LSTM": Case("LSTM"),
    "LSTM-both-states": Case("LSTM", direction="bidirectional", states=True),
    "LSTM-reverse-no-bias": Case("LSTM", direction="reverse", bias=False),
    "LSTM-21": Case("LSTM", opset=21),
    "GRU": Case("GRU", attributes=AFTER),
    "GRU-both-states": Case("GRU", direction="bidirectional", states=True, attributes=AFTER),
}
CLOSED = {
    "GRU-before": Case("GRU"),
    "RNN": Case("RNN"),
    "clip": Case("LSTM", attributes=(("clip", 0.3),)),
    "lengths": Case("LSTM", lengths=True),
}


def cells(case: Case, form: str) -> tuple[OnnxModel, list[str]]:
    """The node with what multiplies its hidden state in that form."""
    model = case.opened()
    hidden = {site.name: form for site in model.sites() if "hidden" in site.name}
    ends = {"forward": [""], "reverse": ["Reverse"], "bidirectional": ["", "Reverse"]}[case.direction]
    prefix = {"int8": "WeightOnly", "bfloat16": "Bfloat16"}.get(form.rsplit(maxsplit=1)[-1], "")
    kind = case.operator.capitalize()
    return put(model, hidden), [f"{prefix}LowRank{kind}{end}" for end in ends]


@pytest.mark.parametrize("form", ["svd 3", "svd 3 int8", "svd 3 bfloat16"])
@pytest.mark.parametrize(
    "name", [name if "both" in name else pytest.param(name, marks=pytest.mark.slow) for name in CELLS]
)
def test_recurrent_cells(name: str, form: str, tmp_path: Path) -> None:
    model, ops = cells(CELLS[name], form)
    holds(model, CELLS[name].batch(), ops, tmp_path / "it.onnx", 2e-5)


@pytest.mark.parametrize("name", CLOSED)
def test_cells_of_other_kinds_stay(name: str) -> None:
    case = CLOSED[name]
    model, _ = cells(case, "svd 3")
    before = model.run(case.batch())
    model.fuse(ignore, ignore, case.batch())
    assert not any("LowRank" in op for op in fused_types(model))
    for answer, exact in zip(model.run(case.batch()).values(), before.values(), strict=True):
        assert torch.allclose(answer, exact, atol=1e-5)


def test_cells_that_read_whole_numbers(tmp_path: Path) -> None:
    case = CELLS["LSTM"]
    model, _ = cells(case, "svd 3")
    model.save(tmp_path / "factored.onnx", {})
    data, pipeline = dict(case.batch().kwargs), "quantize,quantize-activations{calibration=dynamic}"
    made = tdpass.compress(tmp_path / "factored.onnx", None, data, pipeline=pipeline, cache=False)
    holds(OnnxModel.open(made.model), case.batch(), ["Int8LowRankLstm"], tmp_path / "it.onnx", 0.03)


def test_steps_of_grids_are_rounding_for_a_model_in_whole_numbers() -> None:
    pipeline = "plan{params=0.6},factorize,quantize,quantize-activations,fuse-kernels"
    data = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    made = tdpass.compress(layers(2), None, data, pipeline=pipeline, formats=["svd"], cache=False)
    assert "Int8LinearChain2Bytes" in {each.op_type for each in made.model.graph.node}
