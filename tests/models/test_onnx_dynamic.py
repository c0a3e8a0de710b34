"""Products whose integers are made in every call: recognised, made floating-point, factored, run as one operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import model_of, node, weight
from test_onnx_fuse import block
from test_onnx_fuse_integers import IMAGES, ROWS, fused_types, holds, ignore, layers, put, run_file

import tdpass
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel

quantization = pytest.importorskip("onnxruntime.quantization")
DYNAMIC = "quantize,quantize-activations{calibration=dynamic}"
IDS = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int64)


def conv() -> onnx.ModelProto:
    """Convolutions with and without a bias, with strides, pads and groups, and a head."""
    nodes = [
        node("Conv", "x first.weight first.bias", "a", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", "a", "b"),
        node("Conv", "b second.weight", "c", group=2),
        node("GlobalAveragePool", "c", "d"),
        node("Flatten", "d", "e"),
        node("Gemm", "e head.weight head.bias", "y", transB=1),
    ]
    constants = {
        "first.weight": weight(8, 4, 3, 3), "first.bias": weight(8), "second.weight": weight(6, 4, 3, 3),
        "head.weight": weight(5, 6), "head.bias": weight(5),
    }  # fmt: skip
    return model_of(nodes, constants, ("N", 4, 12, 12))


def text() -> onnx.ModelProto:
    """A table of words, a norm, and a layer that reads it on three axes."""
    nodes = [
        node("Gather", "table ids", "rows"),
        node("LayerNormalization", "rows gain shift", "n"),
        node("MatMul", "n mix.weight", "m"),
        node("Add", "m mix.bias", "y"),
    ]
    constants = {
        "table": weight(20, 24), "gain": np.ones(24, np.float32), "shift": weight(24),
        "mix.weight": weight(24, 30), "mix.bias": weight(30),
    }  # fmt: skip
    made = model_of(nodes, constants, ("N", 4))
    made.graph.input[0].CopyFrom(helper.make_tensor_value_info("ids", TensorProto.INT64, ("N", 4)))
    return made


def branches() -> onnx.ModelProto:
    """A product in each branch of an If, of one matrix."""

    def branch(operator: str) -> onnx.GraphProto:
        nodes = [node("MatMul", "x w.weight", f"h{operator}"), node(operator, f"h{operator}", f"z{operator}")]
        out = helper.make_tensor_value_info(f"z{operator}", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, operator, [], [out])

    nodes = [
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "flag"),
        node("If", "flag", "y", then_branch=branch("Relu"), else_branch=branch("Neg")),
    ]
    return model_of(nodes, {"w.weight": weight(8, 6), "zero": np.zeros((), np.float32)}, ("N", 8))


NETS = {
    "conv": (conv, {"x": np.random.default_rng(0).standard_normal((3, 4, 12, 12)).astype(np.float32)}),
    "matrices": (lambda: layers(2), {"x": ROWS.numpy()}),
    "sequences": (lambda: layers(3), {"x": ROWS[None].numpy()}),
    "text": (text, {"ids": IDS}),
    "branches": (branches, {"x": ROWS[:, :8].contiguous().numpy()}),
}


def quantized(
    proto: onnx.ModelProto, folder: Path, kind: str = "QInt8", per_channel: bool = False
) -> onnx.ModelProto:
    """As `quantize_dynamic` of ONNX Runtime writes it."""
    given, made = folder / "dense.onnx", folder / "quantized.onnx"
    onnx.save(proto, given)
    quantization.quantize_dynamic(
        given, made, per_channel=per_channel, weight_type=quantization.QuantType[kind],
        extra_options={"EnableSubgraph": True},
    )  # fmt: skip
    return onnx.load(made)


def answer(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feed)
    return found


def near(found: np.ndarray, exact: np.ndarray, share: float) -> bool:
    return found.shape == exact.shape and np.abs(found - exact).max() <= share * np.abs(exact).max()


def op_types(proto: onnx.ModelProto) -> set[str]:
    graphs = onnx_ir.from_proto(proto).graphs()
    return {each.op_type for graph in graphs for each in graph}


def holds_numbers(
    given: onnx.ModelProto, dense: onnx.ModelProto, feed: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """What `dequantize` makes of a model: nothing of integers is left, and it answers as the dense one."""
    plain = tdpass.dequantize(given)
    assert isinstance(plain, onnx.ModelProto)
    onnx.checker.check_model(plain, full_check=True)
    assert not any("Quantize" in name or "Integer" in name for name in op_types(plain))
    exact = answer(dense, feed)
    assert near(answer(given, feed), exact, 0.06)
    assert near(answer(plain, feed), exact, 0.03)
    return plain


KINDS = [("QInt8", False), ("QInt8", True), ("QUInt8", False)]
CASES = [
    pytest.param(name, *kind, marks=() if kind == KINDS[place % 3] else pytest.mark.slow)
    for place, name in enumerate(NETS)
    for kind in KINDS
]


@pytest.mark.parametrize(("name", "kind", "per_channel"), CASES)
def test_what_onnx_runtime_quantized_is_declined_and_becomes_numbers_when_asked(
    name: str, kind: str, per_channel: bool, tmp_path: Path
) -> None:
    build, feed = NETS[name]
    dense = build()
    given = quantized(dense, tmp_path, kind, per_channel)
    assert op_types(given) & {"MatMulInteger", "ConvInteger"}
    declined = OnnxModel.open(given).declined()
    assert declined
    for site, why in declined.items():
        assert "what tdpass.dequantize makes of this one" in why or site.startswith("table")
    found, wanted = (OnnxModel.open(each).sites() for each in (holds_numbers(given, dense, feed), dense))
    assert {(site.name, site.shape, site.bias) for site in found} == {
        (site.name, site.shape, site.bias) for site in wanted
    }


@pytest.mark.parametrize("name", ["matrices", "sequences"])
def test_products_that_onnx_runtime_made_one_node_are_known_too(name: str, tmp_path: Path) -> None:
    build, feed = NETS[name]
    dense = build()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "made.onnx"), 3
    given = quantized(dense, tmp_path).SerializeToString()
    onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    made = onnx.load(tmp_path / "made.onnx")
    assert op_types(made) & {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    assert all("tdpass.dequantize" in why for why in OnnxModel.open(made).declined().values())
    plain = holds_numbers(made, dense, feed)
    assert len(OnnxModel.open(plain).sites()) == 2


def test_attention_of_bytes_becomes_attention(tmp_path: Path) -> None:
    contrib = node("Attention", "x mix.weight mix.bias", num_heads=2)
    contrib.domain = "com.microsoft"
    constants = {"mix.weight": weight(24, 48), "mix.bias": weight(48)}
    dense = model_of([contrib], constants, ("N", 3, 24), domains=("com.microsoft",))
    dense.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", 3, 16)))
    feed = {"x": ROWS[:3, :24].numpy()[None]}
    given = quantized(dense, tmp_path)
    assert "QAttention" in op_types(given)
    assert "tdpass.dequantize" in next(iter(OnnxModel.open(given).declined().values()))
    plain = holds_numbers(given, dense, feed)
    assert [site.shape for site in OnnxModel.open(plain).sites()] == [(48, 24)]


def test_it_is_factored_and_quantized_anew(tmp_path: Path) -> None:
    dense = layers(2)
    data = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    steps = f"plan{{params=0.6}},factorize,{DYNAMIC},verify"
    plain = tdpass.dequantize(quantized(dense, tmp_path))
    made = tdpass.compress(plain, None, data, pipeline=steps, formats=["svd"], cache=False, strict=False)
    assert "MatMulInteger" in op_types(made.model)
    assert made.report.final.params <= 0.6 * made.report.original.params


def low_rank(rank: int = 2) -> onnx.ModelProto:
    """The two linear layers of `layers`, each as two matrices in a row."""
    model = put(OnnxModel.open(layers(rank)), {"first": "svd 12", "second": "svd 9"})
    made = model.unwrap()
    assert isinstance(made, onnx.ModelProto)
    del made.graph.value_info[:]  # ONNX Runtime's tool turns weights and not what is said of their sizes
    return made


SLOW, REST = pytest.mark.slow, [(2, True), (3, False)]
CHAINS = ["DynamicInt8LinearChain2Relu", "DynamicInt8LinearChain2Add"]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("rank", "per_channel"), [(2, False), (3, True), *(pytest.param(*each, marks=SLOW) for each in REST)]
)
def test_low_rank_chains_of_onnx_runtime_are_one_operator_each(
    rank: int, per_channel: bool, tmp_path: Path
) -> None:
    model = OnnxModel.open(quantized(low_rank(rank), tmp_path, per_channel=per_channel))
    x = ROWS if rank == 2 else ROWS[None].repeat(2, 1, 1)
    zeros = 12 + 96 + 9 + 64 if per_channel else 0
    holds(model, Batch((x,)), CHAINS, tmp_path / "it.onnx", 0.03, dropped=zeros)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["QInt8", pytest.param("QUInt8", marks=pytest.mark.slow)])
def test_low_rank_convolutions_of_onnx_runtime_are_one_operator_each(
    kind: str, per_channel: bool, tmp_path: Path
) -> None:
    forms = {"first": "tucker2 5x4", "second": "tucker2 4x5", "head": "svd 3"}
    made = put(OnnxModel.open(block()), forms).unwrap()
    assert isinstance(made, onnx.ModelProto)
    del made.graph.value_info[:]
    model = OnnxModel.open(quantized(made, tmp_path, kind, per_channel=per_channel))
    batch = Batch((IMAGES,))
    before = model.run(batch)
    signed = kind == "QInt8"  # codes of unsigned bytes, less their zero point, need nine bits
    assert model.fuse(ignore, ignore, batch) is signed
    convolutions = [name for name in fused_types(model) if "Conv" in name]
    assert convolutions == (["DynamicInt8ConvChain3Relu", "DynamicInt8ConvChain3AddRelu"] if signed else [])
    model.save(tmp_path / "it.onnx", {})
    named = {name: tensor.numpy() for name, tensor in model.named_inputs(batch).items()}
    for registered in (True, False):
        (found,) = run_file(tmp_path / "it.onnx", named, registered=registered)
        assert near(found, next(iter(before.values())).numpy(), 0.03)


@pytest.mark.usefixtures("always")
def test_low_rank_layers_in_dynamic_ranges_are_fused_checked_saved_and_run(tmp_path: Path) -> None:
    data = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    given, steps = low_rank(), f"{DYNAMIC},fuse-kernels,verify"
    made = tdpass.compress(given, None, data, pipeline=steps, cache=False)
    assert op_types(made.model) >= set(CHAINS)
    assert 0 < made.report.checks["relative_difference"] < 0.05
    (note,) = (line for row in made.report.passes for line in row.notes if "round what they read" in line)
    assert note.startswith("2 of 2 operators round")
    made.save(tmp_path / "it.onnx")
    feed = {"x": data.numpy()}
    for registered in (True, False):
        (found,) = run_file(tmp_path / "it.onnx", feed, registered=registered)
        assert near(found, answer(given, feed), 0.05)
    # a model that came quantized is held to what its operators round, too
    plain = tdpass.compress(given, None, data, pipeline=DYNAMIC, cache=False).model
    again = tdpass.compress(plain, None, data, pipeline="fuse-kernels,verify", cache=False)
    assert op_types(again.model) >= set(CHAINS)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("low", "fused"), [(100, True), (20, False)])
def test_bytes_without_sign_are_served_where_they_fit_a_byte_with_one(low: int, fused: bool) -> None:
    """Codes less their zero point have to be int8."""
    proto = onnx.ModelProto()
    made = tdpass.compress(low_rank(), None, ROWS, pipeline=DYNAMIC, cache=False).model
    proto.CopyFrom(made)
    del proto.graph.value_info[:]
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    zero = numpy_helper.from_array(np.uint8(low), "zero")
    proto.graph.initializer.append(zero)
    for each in proto.graph.node:
        if each.op_type == "MatMulInteger":
            codes = numpy_helper.to_array(held[each.input[1]]).astype(np.int16)
            shifted = (codes + low).clip(0, 255).astype(np.uint8)
            shifted[0, 0] = 255 if not fused else shifted[0, 0]
            held[each.input[1]].CopyFrom(numpy_helper.from_array(shifted, each.input[1]))
            each.input.append("zero")
    model = OnnxModel.open(proto)
    before = model.run(Batch((ROWS,)))
    model.fuse(ignore, ignore, Batch((ROWS,)))
    assert (fused_types(model) == CHAINS) is fused
    for found, exact in zip(model.run(Batch((ROWS,))).values(), before.values(), strict=True):
        assert near(found.numpy(), exact.numpy(), 0.03)
