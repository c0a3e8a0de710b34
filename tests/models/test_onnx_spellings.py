"""Layers that an ONNX graph says in another way: weights computed from constants, fused operators, Einsum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import model_of, node, svd, weight
from torch import Tensor

from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models.base import Batch
from tdpass.models.onnx.graph.tensors import constant, sizes, to_torch
from tdpass.models.onnx.model import OnnxModel

MS = "com.microsoft"
RNG = np.random.default_rng(3)
W = weight(6, 8, rng=RNG)  # [o, i]
CONV = weight(6, 4, 3, 3, rng=RNG)
B = weight(6, rng=RNG)
IMAGE, ROWS, TOKENS = (2, 4, 5, 5), (3, 8), (2, 3, 8)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@dataclass(frozen=True)
class Case:
    """Nodes from `x` to `y` with one site, named `w`, whose weight they spell in their own way."""

    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    fed: tuple[int, ...]
    weight: np.ndarray = field(default_factory=lambda: W)
    gone: tuple[str, ...] = ()

    def proto(self, opset: int = 17) -> onnx.ModelProto:
        domains = tuple(sorted({made.domain for made in self.nodes if made.domain}))
        return model_of(self.nodes, self.constants, self.fed, opset=opset, domains=domains)


def fused(operator: str, inputs: str, **attributes: Any) -> onnx.NodeProto:
    return node(operator, inputs, domain=MS, **attributes)


HALF = W.T.astype(np.float16)
CASES = {
    "transposed": Case([node("Transpose", "w", "t"), node("MatMul", "x t")], {"w": W}, TOKENS),
    "reshaped": Case(
        [node("Reshape", "w s", "t"), node("MatMul", "x t")],
        {"w": W.T.reshape(-1), "s": ints(8, 6)}, TOKENS, gone=("Reshape",),
    ),
    "cast": Case(
        [node("Cast", "w", "t", to=TensorProto.FLOAT), node("MatMul", "x t")],
        {"w": HALF}, TOKENS, weight=HALF.astype(np.float32).T,
    ),
    "concatenated": Case(
        [node("Concat", "w w2", "t", axis=0), node("Gemm", "x t", transB=1)],
        {"w": W[:4], "w2": W[4:]}, ROWS, gone=("Concat",),
    ),
    "sliced": Case(
        [node("Slice", "w a b c", "t"), node("Gemm", "x t", transB=1)],
        {"w": np.concatenate([B[:, None] @ np.ones((1, 8), np.float32), W]), "a": ints(6), "b": ints(99),
         "c": ints(0)}, ROWS, gone=("Slice",),
    ),
    "unsqueezed_kernel": Case(
        [node("Unsqueeze", "w a", "t"), node("Conv", "x t")],
        {"w": W[:, :4], "a": ints(2, 3)}, IMAGE, weight=W[:, :4, None, None], gone=("Unsqueeze",),
    ),
    "chain_of_rearrangements": Case(
        [node("Reshape", "w s", "r"), node("Transpose", "r", "t", perm=[2, 1, 0]), node("Identity", "t", "u"),
         node("Squeeze", "u ax", "v"), node("MatMul", "x v")],
        {"w": W.reshape(-1), "s": ints(6, 8, 1), "ax": ints(0)}, TOKENS, gone=("Squeeze", "Reshape"),
    ),
    "computed_bias": Case(
        [node("Reshape", "b s", "c"), node("Gemm", "x w c", transB=1)],
        {"w": W, "b": B[:, None], "s": ints(6)}, ROWS,
    ),
    "constant_node": Case(
        [node("Constant", "", "w", value=numpy_helper.from_array(W)), node("Transpose", "w", "t"),
         node("MatMul", "x t")], {}, TOKENS, gone=("Constant",),
    ),
    "constant_of_shape": Case(
        [node("ConstantOfShape", "s", "w", value=numpy_helper.from_array(np.array([0.25], np.float32))),
         node("Gemm", "x w", transB=1)],
        {"s": ints(6, 8)}, ROWS, weight=np.full((6, 8), 0.25, np.float32), gone=("ConstantOfShape",),
    ),
    "constant_of_shape_laid_out_anew": Case(
        [node("ConstantOfShape", "s", "w", value=numpy_helper.from_array(np.array([0.25], np.float32))),
         node("Unsqueeze", "w a", "t"), node("Conv", "x t")],
        {"s": ints(6, 4), "a": ints(2, 3)}, IMAGE, weight=np.full((6, 4, 1, 1), 0.25, np.float32),
        gone=("ConstantOfShape", "Unsqueeze"),
    ),
    "fused_conv": Case(
        [fused("FusedConv", "x w b", activation="Relu", pads=[1, 1, 1, 1])],
        {"w": CONV, "b": B}, IMAGE, weight=CONV, gone=("FusedConv",),
    ),
    "fused_conv_leaky": Case(
        [fused("FusedConv", "x w", activation="LeakyRelu", activation_params=[0.3])],
        {"w": CONV}, IMAGE, weight=CONV, gone=("FusedConv",),
    ),
    "fused_conv_sum": Case(
        [node("Conv", "x v", "z"), fused("FusedConv", "x w b z", activation="Tanh")],
        {"w": CONV, "b": B, "v": weight(6, 4, 3, 3, rng=RNG)}, IMAGE, weight=CONV, gone=("FusedConv",),
    ),
    "fused_gemm": Case(
        [fused("FusedGemm", "x w b", transB=1, activation="Sigmoid", alpha=0.5)],
        {"w": W, "b": B}, ROWS, weight=0.5 * W, gone=("FusedGemm",),
    ),
    "fused_matmul": Case(
        [fused("FusedMatMul", "x w", transB=1, alpha=2.0)], {"w": W}, TOKENS, weight=2 * W,
        gone=("FusedMatMul",),
    ),
    "fused_matmul_transposed": Case(
        [fused("FusedMatMul", "x w", transA=1)], {"w": W.T.copy()}, (2, 8, 3), gone=("FusedMatMul",),
    ),
    "einsum": Case([node("Einsum", "x w", equation="bsi,oi->bso")], {"w": W}, TOKENS, gone=("Einsum",)),
    "einsum_left": Case(
        [node("Einsum", "w x", equation="io, b s i -> s b o")], {"w": W.T.copy()}, TOKENS, gone=("Einsum",)
    ),
    "einsum_inner_axis": Case(
        [node("Einsum", "x w", equation="bis,oi->bos")], {"w": W}, (2, 8, 3), gone=("Einsum",)
    ),
    "einsum_dots": Case([node("Einsum", "x w", equation="...i,io->...o")], {"w": W.T.copy()}, TOKENS),
}  # fmt: skip
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def fed(case: Case) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(case.fed).astype(np.float32)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def full(model: OnnxModel) -> Layer:
    (site,) = (site for site in model.sites() if site.name == "w")
    if not site.axes:
        return svd(model, "w", 6)
    fmt, rank = FORMATS.get("channel_svd"), (min(6, site.weights // 6),)
    return Layer(site, Form(fmt.name, rank), fmt.factorize(model.weight("w"), site, rank), model.bias("w"))


@each
def test_the_weight_is_read_as_what_it_comes_to(case: Case) -> None:
    x = fed(case)
    model = OnnxModel.open(case.proto(), Batch((torch.from_numpy(x),)))
    torch.testing.assert_close(model.weight("w"), torch.from_numpy(case.weight))
    assert model.record(Batch((torch.from_numpy(x),))).site_calls.keys() >= {"w"}


@each
def test_full_rank_changes_no_answer_and_takes_what_made_the_weight_with_it(case: Case) -> None:
    x, proto = fed(case), case.proto()
    model = OnnxModel.open(proto, Batch((torch.from_numpy(x),)))
    model.replace("w", full(model))
    model.check()
    small = model.unwrap()
    tolerance = 5e-3 if case is CASES["cast"] else 1e-4  # its factors are of half precision as the weight was
    np.testing.assert_allclose(run(small, x), run(proto, x), rtol=tolerance, atol=tolerance / 4)
    assert not {made.op_type for made in small.graph.node} & set(case.gone)
    played: Tensor = model.record(Batch((torch.from_numpy(x),))).play().finish()["y"]
    np.testing.assert_allclose(played.numpy(), run(small, x), rtol=1e-4, atol=1e-5)


@each
def test_left_dense_nothing_is_touched(case: Case) -> None:
    proto = case.proto()
    made = OnnxModel.open(proto, Batch((torch.from_numpy(fed(case)),))).unwrap()
    if case is CASES["transposed"] or case is CASES["constant_node"]:
        return  # a lone transposition is stored the way it is read
    assert [n.SerializeToString() for n in made.graph.node] == [
        n.SerializeToString() for n in proto.graph.node
    ]
    assert sorted(t.SerializeToString() for t in made.graph.initializer) == sorted(
        t.SerializeToString() for t in proto.graph.initializer
    )


@pytest.mark.parametrize("version", [3, 8])
@pytest.mark.parametrize("name", ["constant_of_shape", "constant_of_shape_laid_out_anew"])
def test_a_weight_that_a_shape_is_filled_for_counts_like_a_stored_one(name: str, version: int) -> None:
    case = CASES[name]
    proto = case.proto()
    proto.ir_version = version
    if version < 4:  # where initializers are inputs
        held = proto.graph.initializer
        proto.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in held)
    model = OnnxModel.open(proto, Batch((torch.from_numpy(fed(case)),)))
    assert (model.params(), model.bytes()) == (case.weight.size, 4 * case.weight.size)


@pytest.mark.parametrize("wanted", [(2**14, 2**14), (2**62, 8), (-1, 8)], ids=str)
def test_a_shape_too_large_or_impossible_to_fill_is_left_to_the_runtime(wanted: tuple[int, ...]) -> None:
    made = node("ConstantOfShape", "s", "w")
    graph = ir.from_proto(model_of([made, node("MatMul", "x w")], {"s": ints(*wanted)}, (1, wanted[0]))).graph
    assert constant(graph[0].outputs[0]) is None


def test_a_filled_shape_takes_the_memory_of_one_number() -> None:
    graph = ir.from_proto(
        model_of(
            [node("ConstantOfShape", "s", "w"), node("MatMul", "x w")], {"s": ints(2**13, 2**13)}, (1, 2**13)
        )
    ).graph
    tensor = constant(graph[0].outputs[0])
    assert tensor is not None
    assert (sizes(tensor), to_torch(tensor).untyped_storage().nbytes()) == ((2**13, 2**13), 4)


def test_a_weight_that_is_cast_keeps_the_type_it_is_stored_in() -> None:
    case = CASES["cast"]
    model = OnnxModel.open(case.proto(), Batch((torch.from_numpy(fed(case)),)))
    (site,) = model.sites()
    assert (site.itemsize, model.bytes()) == (2, 2 * W.size)
    model.replace("w", svd(model, "w", 2))
    assert model.bytes() == 2 * 2 * (6 + 8)
    kinds = {t.data_type for t in model.unwrap().graph.initializer}
    assert kinds == {TensorProto.FLOAT16}


def test_what_is_also_read_by_another_node_stays() -> None:
    nodes = [
        node("Concat", "w w2", "t", axis=0),
        node("Gemm", "x t", "h", transB=1),
        node("ReduceSum", "w2", "s", keepdims=0),
        node("Add", "h s"),
    ]
    proto = model_of(nodes, {"w": W[:4], "w2": W[4:]}, ROWS)
    model = OnnxModel.open(proto, Batch((torch.zeros(ROWS),)))
    assert model.sites() == []
    assert "ReduceSum" in next(iter(model.declined().values()))


@pytest.mark.parametrize(
    ("made", "held", "fed_to", "reason"),
    [
        (fused("FusedConv", "x w", activation="Clip"), CONV, IMAGE, "fused with Clip"),
        (
            node("Einsum", "x w", equation="bij,bjk->bik"), weight(2, 8, 6, rng=RNG), TOKENS,
            "no product with one matrix",
        ),
        (node("Einsum", "x w", equation="bij,jk->ik"), W.T.copy(), TOKENS, "no product|sums over"),
        (node("Einsum", "x w w", equation="bij,jk,jk->bik"), W.T.copy(), TOKENS, "several operands"),
        (fused("FusedMatMul", "x w", transBatchA=1), weight(2, 6, rng=RNG), TOKENS, "axes of samples"),
    ],
)  # fmt: skip
def test_what_is_no_plain_layer_is_left_with_the_reason(
    made: onnx.NodeProto, held: np.ndarray, fed_to: tuple[int, ...], reason: str
) -> None:
    proto = model_of([made], {"w": held}, fed_to, domains=(MS,))
    model = OnnxModel.open(proto)
    assert model.sites() == []
    assert any(word in model.declined()["w"] for word in reason.split("|")), model.declined()
