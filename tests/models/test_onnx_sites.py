"""Every way an ONNX graph can hold a weight, and what of it is a site.

Replacing a site by an exact factorization changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import tdpass.formats  # noqa: F401 - fills the registry
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel
from tdpass.site import Site

RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)


@dataclass
class Case:
    """A graph with one input `x` and output `y`, and the site that is to be found in it."""

    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    x: Sequence[int | str]
    fed: tuple[int, ...]
    site: str = "w"
    shape: tuple[int, ...] = ()
    bias: bool = False
    opset: int = 17
    outputs: dict[str, Sequence[int | str]] = field(default_factory=lambda: {"y": ()})
    dtype: int = TensorProto.FLOAT
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    infer: bool = True
    ir_version: int = 8

    def proto(self) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("x", self.dtype, self.x)]
        if self.ir_version < 4:
            inputs += [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for n, a in self.constants.items()
            ]
        outputs = [helper.make_tensor_value_info(name, self.dtype, None) for name in self.outputs]
        tensors = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "case", inputs, outputs, tensors)
        opsets = [
            helper.make_opsetid("", self.opset),
            *(helper.make_opsetid(f.domain, 1) for f in self.functions),
        ]
        proto = helper.make_model(
            graph, opset_imports=opsets, ir_version=self.ir_version, functions=self.functions
        )
        return onnx.shape_inference.infer_shapes(proto) if self.infer else proto


def node(operator: str, inputs: str, outputs: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def linear_cases() -> dict[str, Callable[[], Case]]:
    w, b = weight(6, 8), weight(6)
    return {
        "gemm_transB": lambda: Case(
            [node("Gemm", "x w b", transB=1)], {"w": w, "b": b}, ("N", 8), (4, 8), shape=(6, 8), bias=True
        ),
        "gemm_plain": lambda: Case(
            [node("Gemm", "x w b")], {"w": w.T.copy(), "b": b}, ("N", 8), (4, 8), shape=(6, 8), bias=True
        ),
        "gemm_without_c": lambda: Case(
            [node("Gemm", "x w", transB=1)], {"w": w}, ("N", 8), (4, 8), shape=(6, 8)
        ),
        "gemm_transA_alpha_beta": lambda: Case(
            [node("Gemm", "x w b", transA=1, alpha=0.5, beta=2.0)],
            {"w": w.T.copy(), "b": b},
            (8, "N"),
            (8, 4),
            shape=(6, 8),
            bias=True,
        ),
        "gemm_row_c": lambda: Case(
            [node("Gemm", "x w b", transB=1)],
            {"w": w, "b": b[None]},
            ("N", 8),
            (4, 8),
            shape=(6, 8),
            bias=True,
        ),
        "gemm_matrix_c": lambda: Case(
            [node("Gemm", "x w c", transB=1, beta=0.5)],
            {"w": w, "c": weight(4, 6)},
            (4, 8),
            (4, 8),
            shape=(6, 8),
        ),
        "gemm_computed_c": lambda: Case(
            [node("Relu", "x", "r"), node("Gemm", "x w r", transB=1, beta=3.0)],
            {"w": weight(8, 8)},
            ("N", 8),
            (4, 8),
            shape=(8, 8),
        ),
        "gemm_left": lambda: Case(
            [node("Gemm", "w x b", beta=2.0)],
            {"w": w, "b": b[:, None]},
            (8, "N"),
            (8, 4),
            shape=(6, 8),
            bias=True,
        ),
        "gemm_left_transposed": lambda: Case(
            [node("Gemm", "w x", transA=1, transB=1)], {"w": w.T.copy()}, ("N", 8), (4, 8), shape=(6, 8)
        ),
        "gemm_opset_9": lambda: Case(
            [node("Gemm", "x w b", transB=1)],
            {"w": w, "b": b},
            ("N", 8),
            (4, 8),
            shape=(6, 8),
            bias=True,
            opset=9,
        ),
        "matmul_right": lambda: Case(
            [node("MatMul", "x w")], {"w": w.T.copy()}, ("B", "S", 8), (2, 3, 8), shape=(6, 8)
        ),
        "matmul_static": lambda: Case(
            [node("MatMul", "x w")], {"w": w.T.copy()}, (2, 3, 8), (2, 3, 8), shape=(6, 8)
        ),
        "matmul_unknown_rank": lambda: Case(
            [node("MatMul", "x w")], {"w": w.T.copy()}, ("B", "S", 8), (2, 3, 8), shape=(6, 8), infer=False
        ),
        "matmul_add": lambda: Case(
            [node("MatMul", "x w", "p"), node("Add", "b p")],
            {"w": w.T.copy(), "b": b},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
            bias=True,
        ),
        "matmul_add_broadcast": lambda: Case(
            [node("MatMul", "x w", "p"), node("Add", "p b")],
            {"w": w.T.copy(), "b": b[None, None]},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
            bias=True,
        ),
        "matmul_add_raising_rank": lambda: Case(
            [node("MatMul", "x w", "p"), node("Add", "p b")],
            {"w": w.T.copy(), "b": b[None, None, None]},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
        ),
        "matmul_product_is_output": lambda: Case(
            [node("MatMul", "x w", "p"), node("Add", "p b")],
            {"w": w.T.copy(), "b": b},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
            outputs={"y": (), "p": ()},
        ),
        "matmul_left": lambda: Case(
            [node("MatMul", "w x")], {"w": w}, ("B", 8, "S"), (2, 8, 3), shape=(6, 8)
        ),
        "matmul_left_add": lambda: Case(
            [node("MatMul", "w x", "p"), node("Add", "p b")],
            {"w": w, "b": b[:, None]},
            ("B", 8, "S"),
            (2, 8, 3),
            shape=(6, 8),
            bias=True,
        ),
        "matmul_left_vector": lambda: Case([node("MatMul", "w x")], {"w": w}, (8,), (8,), shape=(6, 8)),
        "matmul_opset_9": lambda: Case(
            [node("MatMul", "x w", "p"), node("Add", "p b")],
            {"w": w.T.copy(), "b": b},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
            bias=True,
            opset=9,
        ),
        "matmul_ir_3": lambda: Case(
            [node("MatMul", "x w")],
            {"w": w.T.copy()},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
            opset=8,
            ir_version=3,
        ),
        "constant_node": lambda: Case(
            [
                helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w.T.copy())),
                node("MatMul", "x w"),
            ],
            {},
            ("B", 8),
            (4, 8),
            shape=(6, 8),
        ),
        "folded_transpose": lambda: Case(
            [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t")],
            {"w": w},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
        ),
        "identity": lambda: Case(
            [node("Identity", "w", "t"), node("MatMul", "x t")],
            {"w": w.T.copy()},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
        ),
        "shared": lambda: Case(
            [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("MatMul", "r w")],
            {"w": weight(8, 8)},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(8, 8),
        ),
        "shared_different_biases": lambda: Case(
            [
                node("MatMul", "x w", "h"),
                node("Add", "h b", "r"),
                node("MatMul", "r w", "p"),
                node("Add", "p c"),
            ],
            {"w": weight(8, 8), "b": weight(8), "c": weight(8)},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(8, 8),
        ),
        "intermediate_is_output": lambda: Case(
            [node("Gemm", "x w b", "h", transB=1), node("Relu", "h", "y")],
            {"w": w, "b": b},
            ("N", 8),
            (4, 8),
            shape=(6, 8),
            bias=True,
            outputs={"y": (), "h": ()},
        ),
        "fp16": lambda: Case(
            [node("MatMul", "x w", "p"), node("Add", "p b")],
            {"w": w.T.astype(np.float16), "b": b.astype(np.float16)},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
            bias=True,
            dtype=TensorProto.FLOAT16,
        ),
        "double": lambda: Case(
            [node("MatMul", "x w")],
            {"w": w.T.astype(np.float64)},
            ("B", "S", 8),
            (2, 3, 8),
            shape=(6, 8),
            dtype=TensorProto.DOUBLE,
        ),
    }


def conv_cases() -> dict[str, Callable[[], Case]]:
    w, b = weight(5, 4, 3, 3), weight(5)
    plain = {"w": w, "b": b}
    found = {"shape": (5, 4, 3, 3), "bias": True}
    cases = {
        "conv": lambda: Case(
            [node("Conv", "x w b", pads=[1, 1, 1, 1])], plain, ("N", 4, "H", "W"), (2, 4, 7, 6), **found
        ),
        "conv_strided_asymmetric": lambda: Case(
            [node("Conv", "x w b", strides=[2, 1], pads=[0, 1, 1, 2])],
            plain,
            ("N", 4, 7, 6),
            (2, 4, 7, 6),
            **found,
        ),
        "conv_dilated": lambda: Case(
            [node("Conv", "x w b", dilations=[2, 1], pads=[2, 0, 2, 0])],
            plain,
            ("N", 4, 7, 6),
            (2, 4, 7, 6),
            **found,
        ),
        "conv_same_upper": lambda: Case(
            [node("Conv", "x w b", strides=[2, 2], auto_pad="SAME_UPPER")],
            plain,
            ("N", 4, 8, 7),
            (2, 4, 8, 7),
            **found,
        ),
        "conv_same_lower": lambda: Case(
            [node("Conv", "x w b", strides=[2, 2], auto_pad="SAME_LOWER")],
            plain,
            ("N", 4, 8, 7),
            (2, 4, 8, 7),
            **found,
        ),
        "conv_same_unstrided": lambda: Case(
            [node("Conv", "x w b", auto_pad="SAME_UPPER")], plain, ("N", 4, "H", "W"), (2, 4, 8, 7), **found
        ),
        "conv_valid": lambda: Case(
            [node("Conv", "x w", auto_pad="VALID")],
            {"w": w},
            ("N", 4, 8, 7),
            (2, 4, 8, 7),
            shape=(5, 4, 3, 3),
        ),
        "conv_1d": lambda: Case(
            [node("Conv", "x w b", strides=[2])],
            {"w": weight(5, 4, 3), "b": b},
            ("N", 4, 9),
            (2, 4, 9),
            shape=(5, 4, 3),
            bias=True,
        ),
        "conv_3d": lambda: Case(
            [node("Conv", "x w", pads=[1, 0, 1, 1, 0, 1])],
            {"w": weight(5, 4, 3, 2, 3)},
            ("N", 4, 5, 4, 5),
            (1, 4, 5, 4, 5),
            shape=(5, 4, 3, 2, 3),
        ),
        "conv_shared": lambda: Case(
            [
                node("Conv", "x w b", "h", pads=[1, 1, 1, 1]),
                node("Relu", "h", "r"),
                node("Conv", "r w b", pads=[1, 1, 1, 1]),
            ],
            {"w": weight(4, 4, 3, 3), "b": weight(4)},
            ("N", 4, 7, 6),
            (2, 4, 7, 6),
            shape=(4, 4, 3, 3),
            bias=True,
        ),
    }
    for opset in (7, 9, 11, 13, 20, 22):
        cases[f"conv_opset_{opset}"] = lambda opset=opset: Case(
            [node("Conv", "x w b")], plain, ("N", 4, 7, 6), (2, 4, 7, 6), opset=opset, **found
        )
    return cases


LINEAR, CONV = linear_cases(), conv_cases()


def run_original(proto: onnx.ModelProto, x: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {
        name: torch.from_numpy(value)
        for name, value in zip(names, session.run(names, {"x": x.numpy()}), strict=True)
    }


def fed(case: Case) -> torch.Tensor:
    dtype = {TensorProto.FLOAT16: torch.float16, TensorProto.DOUBLE: torch.float64}.get(
        case.dtype, torch.float32
    )
    return torch.randn(case.fed, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same(
    got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        assert got[name].shape == value.shape
        assert float((got[name].double() - value.double()).norm() / value.double().norm()) < tolerance


def whole(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The one factor of the format that keeps a weight as it is."""
    (name,) = FORMATS.get("dense").shapes(Site("", "linear", (1, 1)), ())
    return {name: weight}


def exact(model: OnnxModel, site: Site) -> Layer:
    """A layer that equals the dense one: an SVD of full rank, or a convolution's weight as one factor."""
    if site.kind == "linear":
        rank: tuple[int, ...] = (min(site.shape),)
        factors = FORMATS.get("svd").factorize(model.weight(site.name), site, rank)
        return Layer(site, Form("svd", rank), factors, model.bias(site.name))
    return Layer(site, DENSE, whole(model.weight(site.name)), model.bias(site.name))


def interface(proto: onnx.ModelProto) -> list[tuple[str, bytes]]:
    initializers = {tensor.name for tensor in proto.graph.initializer}
    values = [value for value in (*proto.graph.input, *proto.graph.output) if value.name not in initializers]
    return [(value.name, value.type.SerializeToString(deterministic=True)) for value in values]


@pytest.mark.parametrize("name", [*LINEAR, *CONV])
def test_replaced_site_computes_the_same(name: str) -> None:
    case = {**LINEAR, **CONV}[name]()
    proto = case.proto()
    before = proto.SerializeToString()
    x = fed(case)
    wanted = run_original(proto, x)
    tolerance = 5e-3 if case.dtype == TensorProto.FLOAT16 else 1e-4

    model = OnnxModel.open(proto)
    (site,) = model.sites()
    assert (site.name, site.shape, site.bias) == (case.site, case.shape, case.bias)
    assert model.declined() == {}
    assert_same(model.run(Batch((x,))), wanted, tolerance)
    tape = model.record(Batch((x,)))
    assert set(tape.site_calls) == {site.name}
    assert_same(tape.play().finish(), wanted, tolerance)

    params = model.params()
    model.replace(site.name, exact(model, site))
    model.check()
    assert_same(model.run(Batch((x,))), wanted, tolerance)
    assert_same(model.record(Batch((x,))).play().finish(), wanted, tolerance)
    rewritten = model.unwrap()
    assert isinstance(rewritten, onnx.ModelProto)
    assert interface(rewritten) == interface(proto)
    assert (rewritten.ir_version, rewritten.opset_import[0].version) == (proto.ir_version, case.opset)
    factors = sum(factor.numel() for factor in model.layer(site.name).factors.values())
    assert model.params() == params - site.weights + factors
    assert proto.SerializeToString() == before


@pytest.mark.parametrize(
    "name", ["conv", "conv_strided_asymmetric", "conv_dilated", "conv_same_lower", "conv_3d", "conv_shared"]
)
@pytest.mark.parametrize("form", ["spatial_svd", "tucker2", "block_term"])
def test_convolution_formats_agree_with_their_dense_weight(name: str, form: str) -> None:
    case = CONV[name]()
    model = OnnxModel.open(case.proto())
    (site,) = model.sites()
    layout = FORMATS.get(form)
    rank = layout.ranks(site)[len(layout.ranks(site)) // 2]
    layer = Layer(
        site, Form(form, rank), layout.factorize(model.weight(site.name), site, rank), model.bias(site.name)
    )
    x = fed(case)
    dense = model.clone()
    dense.replace(site.name, Layer(site, DENSE, whole(layer.reconstruct().float()), layer.bias))
    model.replace(site.name, layer)
    model.check()
    assert_same(model.run(Batch((x,))), dense.run(Batch((x,))))


@pytest.mark.parametrize(
    "name",
    ["matmul_right", "matmul_static", "matmul_opset_9", "matmul_unknown_rank", "gemm_transB", "matmul_left"],
)
def test_linear_format_with_positions_agrees_with_its_dense_weight(name: str) -> None:
    case = LINEAR[name]()
    model = OnnxModel.open(case.proto())
    (site,) = model.sites()
    layout = FORMATS.get("block_term")
    rank = layout.ranks(site)[-1]
    layer = Layer(
        site,
        Form("block_term", rank),
        layout.factorize(model.weight(site.name), site, rank),
        model.bias(site.name),
    )
    x = fed(case)
    dense = model.clone()
    dense.replace(site.name, Layer(site, DENSE, whole(layer.reconstruct().float()), layer.bias))
    model.replace(site.name, layer)
    model.check()
    assert_same(model.run(Batch((x,))), dense.run(Batch((x,))))


def test_no_constant_is_rearranged_at_run_time() -> None:
    model = OnnxModel.open(LINEAR["matmul_right"]().proto())
    (site,) = model.sites()
    model.replace(site.name, exact(model, site))
    graph = ir.from_proto(model.unwrap()).graph
    assert [n.op_type for n in graph] == ["MatMul", "MatMul"]
    assert {name: tuple(value.shape.numpy()) for name, value in graph.initializers.items()} == {
        "w.v": (8, 6),
        "w.u": (6, 6),
    }


def test_shared_weight_keeps_shared_factors() -> None:
    model = OnnxModel.open(LINEAR["shared"]().proto())
    (site,) = model.sites()
    model.replace(site.name, exact(model, site))
    assert [tensor.name for tensor in model.unwrap().graph.initializer] == ["w.v", "w.u"]


def test_static_sizes_need_no_shape_arithmetic() -> None:
    model = OnnxModel.open(LINEAR["matmul_static"]().proto())
    (site,) = model.sites()
    layout = FORMATS.get("block_term")
    rank = layout.ranks(site)[-1]
    model.replace(
        site.name,
        Layer(site, Form("block_term", rank), layout.factorize(model.weight(site.name), site, rank)),
    )
    assert "Shape" not in {n.op_type for n in model.unwrap().graph.node}


def declined_cases() -> dict[str, tuple[Callable[[], Case], str]]:
    w, square = weight(6, 8), weight(8, 8)

    embedding = [
        node("Cast", "x", "i", to=TensorProto.INT64),
        node("Gather", "w i", axis=1),
    ]
    return {
        "dynamic_same": (
            lambda: Case(
                [node("Conv", "x w", strides=[2, 2], auto_pad="SAME_UPPER")],
                {"w": weight(5, 4, 3, 3)},
                ("N", 4, "H", "W"),
                (),
                opset=11,
            ),
            "static input size or opset 12",
        ),
        "transposed_dynamic_shape": (
            lambda: Case(
                [node("ConvTranspose", "x w", output_shape=[9, 9])],
                {"w": weight(4, 5, 3, 3)},
                ("N", 4, "H", "W"),
                (),
            ),
            "static input size",
        ),
        "quantized": (
            lambda: Case(
                [
                    node("DynamicQuantizeLinear", "x", "c s z"),
                    node("MatMulInteger", "c q z", "i"),
                    node("Cast", "i", "f", to=TensorProto.FLOAT),
                    node("Mul", "f s"),
                ],
                {"q": (w.T * 50).astype(np.int8)},
                (2, 8),
                (),
            ),
            "quantized",
        ),
        "quantized_by_input": (
            lambda: Case(
                [node("DequantizeLinear", "q s", "w", axis=0), node("MatMul", "x w")],
                {"q": (w.T * 50).astype(np.int8), "s": np.linspace(0.01, 0.02, 8, dtype=np.float32)},
                (2, 8),
                (),
            ),
            "other scales than one, or one for each output channel",
        ),
        "batched": (
            lambda: Case([node("MatMul", "x w")], {"w": weight(2, 8, 6)}, (2, 3, 8), ()),
            "several matrices as one weight; export the model",
        ),
        "also_read_by_transpose": (
            lambda: Case(
                [node("MatMul", "x w", "h"), node("Transpose", "w", "t"), node("MatMul", "h t")],
                {"w": w.T.copy()},
                (2, 8),
                (),
            ),
            "Transpose",
        ),
        "table_of_columns": (
            lambda: Case(embedding, {"w": square}, (2, 3), ()),
            "another axis than its rows",
        ),
        "orientation": (
            lambda: Case(
                [node("MatMul", "x w", "h"), node("Gemm", "h w", transB=1)], {"w": square}, (2, 8), ()
            ),
            "orientation",
        ),
        "weight_is_output": (
            lambda: Case([node("MatMul", "x w")], {"w": w.T.copy()}, (2, 8), (), outputs={"y": (), "w": ()}),
            "graph output",
        ),
    }


DECLINED = declined_cases()


@pytest.mark.parametrize("name", DECLINED)
def test_declines_with_the_reason(name: str) -> None:
    build, reason = DECLINED[name]
    model = OnnxModel.open(build().proto())
    assert any(reason in text for text in model.declined().values()), model.declined()
    assert not {site.name for site in model.sites()} & set(model.declined())


@pytest.mark.parametrize("overridable", [(), ("w",), ("*",)])
def test_an_initializer_that_is_an_input_too_is_a_weight_unless_callers_set_it(
    overridable: tuple[str, ...],
) -> None:
    proto = LINEAR["matmul_right"]().proto()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (8, 6)))
    model = OnnxModel.open(proto, overridable=overridable)
    inputs = [value.name for value in model.unwrap().graph.input]
    if overridable:
        assert (model.sites(), inputs, model.signature().notes) == ([], ["x", "w"], ())
        assert "graph input" in model.declined()["w"]
    else:
        assert ([site.name for site in model.sites()], inputs) == (["w"], ["x"])
        assert "--overridable" in model.signature().notes[0]
        assert "w" in model.signature().notes[0]


@pytest.mark.parametrize(
    ("initializer", "name", "scopes", "expected"),
    [
        ("encoder.fc.weight", "n", None, "encoder.fc"),
        ("val_0", "node_MatMul_3", "['', 'blocks.0', 'blocks.0.q', 'linear']", "blocks.0.q"),
        ("onnx::MatMul_512", "/bert/encoder/layer.0/query/MatMul", None, "bert.encoder.layer.0.query"),
        ("42", "dense_1", None, "dense_1"),
        ("7", "", None, "7"),
    ],
)
def test_names_follow_the_module_path(initializer: str, name: str, scopes: str | None, expected: str) -> None:
    proto = Case([node("MatMul", f"x {initializer}")], {initializer: weight(8, 6)}, ("B", 8), ()).proto()
    proto.graph.node[0].name = name
    if scopes is not None:
        proto.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert [site.name for site in OnnxModel.open(proto).sites()] == [expected]


def test_output_of_the_runtime_optimizer_is_accepted() -> None:
    """ONNX Runtime writes LayerNormalization into the standard domain of opsets that do not have it."""
    nodes = [node("LayerNormalization", "x g b", "n"), node("MatMul", "n w")]
    case = Case(
        nodes,
        {"g": weight(8), "b": weight(8), "w": weight(8, 6)},
        ("B", "S", 8),
        (2, 3, 8),
        opset=13,
        infer=False,
    )
    model = OnnxModel.open(case.proto())
    (site,) = model.sites()
    x = fed(case)
    wanted = run_original(case.proto(), x)
    model.replace(site.name, exact(model, site))
    model.check()
    assert_same(model.run(Batch((x,))), wanted)
    assert_same(model.record(Batch((x,))).play().finish(), wanted)
