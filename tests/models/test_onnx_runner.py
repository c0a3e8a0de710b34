"""The runner agrees with ONNX Runtime, operator by operator and on whole networks.

What it runs can be recorded and differentiated.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tdpass.errors import InvalidModelError, UnsupportedError
from tdpass.models import open_model, open_recurrent
from tdpass.models.base import Batch
from tdpass.models.onnx.graph.functions import FUNCTIONS
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import from_memory
from tdpass.models.onnx.model import OnnxModel
from tdpass.models.onnx.rewriting.normalize import normalized
from tdpass.models.onnx.runner import OnnxRunner
from tdpass.models.onnx.sites.sites import find_sites

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 6, 8)).astype(np.float32)
P = np.abs(X) + 0.1
PICKED = np.array([[0, 2, -1]], dtype=np.int64)


def f(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def i(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def ramp(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / np.prod(shape) + 0.5).astype(
        np.float32
    )


def c(array: Any) -> np.ndarray:
    """An input that is stored in the model."""
    stored = np.array(array)
    stored.flags.writeable = False
    return stored


# operator, inputs (those made by c() are constants), attributes, opset
CASES: list[tuple[str, list[np.ndarray | None], dict[str, Any], int]] = [
    *(
        (name, [X], {}, 17)
        for name in (
            "Relu",
            "Sigmoid",
            "Tanh",
            "Softplus",
            "Softsign",
            "HardSwish",
            "Erf",
            "Exp",
            "Abs",
            "Neg",
            "Sign",
            "Floor",
        )
    ),
    *((name, [X], {}, 17) for name in ("Ceil", "Round", "Sin", "Cos", "Identity", "Elu", "Selu", "Celu")),
    *((name, [X], {}, 17) for name in ("LeakyRelu", "ThresholdedRelu", "HardSigmoid", "IsNaN")),
    *((name, [P], {}, 17) for name in ("Sqrt", "Log", "Reciprocal")),
    ("Mish", [X], {}, 18),
    ("Gelu", [X], {}, 20),
    ("Gelu", [X], {"approximate": "tanh"}, 20),
    ("LeakyRelu", [X], {"alpha": 0.3}, 17),
    ("Elu", [X], {"alpha": 2.0}, 17),
    ("HardSigmoid", [X], {"alpha": 1 / 6, "beta": 0.5}, 17),
    ("PRelu", [X, c(ramp(4, 1, 1))], {}, 17),
    ("Clip", [X, c(f(0)[0]), c(f(6)[0])], {}, 17),
    ("Clip", [X], {"min": -0.5, "max": 0.5}, 9),
    ("Clip", [X, None, c(f(1)[0])], {}, 13),
    *((name, [X, P], {}, 17) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")),
    *((name, [X, P], {}, 17) for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    ("Pow", [P, c(f(2)[0])], {}, 17),
    ("Pow", [P, i(2)], {}, 17),
    ("Div", [i(7, -7), i(2, 2)], {}, 17),
    ("Mod", [i(7, -7), i(4, 4)], {}, 17),
    ("Mod", [X, P], {"fmod": 1}, 17),
    ("And", [X > 0, P > 1], {}, 17),
    ("Or", [X > 0, P > 1], {}, 17),
    ("Xor", [X > 0, P > 1], {}, 17),
    ("Not", [X > 0], {}, 17),
    ("Where", [X > 0, X, P], {}, 17),
    ("Softmax", [X], {}, 17),
    ("Softmax", [X], {"axis": 1}, 17),
    ("Softmax", [X], {}, 11),
    ("LogSoftmax", [X], {"axis": 2}, 13),
    ("LogSoftmax", [X], {"axis": 2}, 9),
    *(
        (name, [P], {"axes": [1, 3], "keepdims": 0}, 11)
        for name in (
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceProd",
            "ReduceL1",
            "ReduceL2",
        )
    ),
    *((name, [P], {"axes": [1]}, 11) for name in ("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")),
    ("ReduceSum", [X, c(i(2))], {}, 13),
    ("ReduceMean", [X, c(i(2, 3))], {"keepdims": 0}, 18),
    ("ReduceMean", [X], {}, 18),
    ("ReduceSum", [X], {"noop_with_empty_axes": 1}, 13),
    ("ArgMax", [X], {"axis": 1, "keepdims": 0}, 13),
    ("ArgMin", [X], {"axis": -1}, 13),
    ("ArgMax", [X], {"select_last_index": 1}, 13),
    ("MatMul", [X, np.swapaxes(P, 2, 3).copy()], {}, 17),
    ("Gemm", [ramp(4, 3), ramp(4, 5), ramp(5)], {"transA": 1, "alpha": 0.5, "beta": 2.0}, 17),
    ("Einsum", [X, P], {"equation": "nchw,ncvw->nhv"}, 17),
    ("CumSum", [X, c(np.int64(1))], {}, 14),
    ("CumSum", [X, c(np.int64(2))], {"reverse": 1, "exclusive": 1}, 14),
    ("Reshape", [X, c(i(0, -1, 8))], {}, 17),
    ("Reshape", [X, i(2, 24, 8)], {}, 17),
    ("Flatten", [X], {"axis": 2}, 17),
    ("Flatten", [X], {"axis": 0}, 17),
    ("Flatten", [X], {"axis": -1}, 17),
    ("Transpose", [X], {"perm": [0, 2, 3, 1]}, 17),
    ("Transpose", [X], {}, 17),
    ("Squeeze", [X[:1], c(i(0))], {}, 17),
    ("Squeeze", [X[:1]], {"axes": [0]}, 11),
    ("Squeeze", [X[:1]], {}, 13),
    ("Unsqueeze", [X, c(i(0, -1))], {}, 17),
    ("Unsqueeze", [X], {"axes": [2]}, 11),
    ("Concat", [X, P], {"axis": 1}, 17),
    ("Concat", [X, P], {"axis": -1}, 17),
    ("Slice", [X, c(i(1)), c(i(5)), c(i(2)), c(i(2))], {}, 17),
    ("Slice", [X, c(i(-1)), c(i(-100)), c(i(3)), c(i(-1))], {}, 17),
    ("Slice", [X, c(i(-2)), c(i(2**62)), c(i(-1))], {}, 17),
    ("Slice", [X], {"axes": [1, 2], "starts": [1, 0], "ends": [3, -1]}, 9),
    ("Gather", [X, PICKED], {"axis": 2}, 17),
    ("Gather", [X, np.int64(1)], {"axis": 1}, 17),
    ("Gather", [X, c(i(1, 0))], {}, 17),
    ("GatherElements", [ramp(3, 3), i(0, -1, 2).reshape(1, 3)], {"axis": 0}, 17),
    ("GatherND", [X, i(0, 1, 1, 2).reshape(2, 2)], {}, 17),
    ("GatherND", [X, i(1, 2).reshape(2, 1)], {"batch_dims": 1}, 17),
    ("Expand", [ramp(4, 1), c(i(2, 1, 5))], {}, 17),
    ("Tile", [ramp(2, 3), c(i(2, 1))], {}, 17),
    ("Shape", [X], {}, 17),
    ("Shape", [X], {"start": 1, "end": -1}, 17),
    ("Size", [X], {}, 17),
    ("Cast", [X], {"to": TensorProto.INT64}, 17),
    ("Cast", [X], {"to": TensorProto.FLOAT16}, 17),
    ("CastLike", [X, c(np.float64(0))], {}, 17),
    ("ConstantOfShape", [i(2, 3)], {"value": numpy_helper.from_array(f(1.5))}, 17),
    ("Range", [np.int64(1), np.int64(9), np.int64(3)], {}, 17),
    ("Dropout", [X], {}, 17),
    ("Trilu", [X], {}, 17),
    ("Trilu", [X, c(np.int64(-1))], {"upper": 0}, 17),
    ("Pad", [X, c(i(0, 0, 1, 2, 0, 0, 3, 0)), c(f(0.5)[0])], {}, 17),
    ("Pad", [X, c(i(0, 0, 1, 2, 0, 0, 3, 0))], {"mode": "reflect"}, 17),
    ("Pad", [X], {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "edge"}, 9),
    ("Pad", [X, c(i(1, 2)), None, c(i(-1))], {}, 18),
    ("Pad", [X, c(i(0, 1, 0, 0, 0, 1, 0, 0))], {"mode": "reflect"}, 17),
    ("DepthToSpace", [X], {"blocksize": 2}, 17),
    ("DepthToSpace", [X], {"blocksize": 2, "mode": "CRD"}, 17),
    ("SpaceToDepth", [X], {"blocksize": 2}, 17),
    ("Conv", [X, ramp(6, 2, 3, 3), ramp(6)], {"group": 2, "pads": [1, 0, 0, 2], "strides": [2, 1]}, 17),
    ("Conv", [X, ramp(4, 1, 3, 3)], {"group": 4, "auto_pad": "SAME_LOWER"}, 17),
    (
        "ConvTranspose",
        [X, ramp(4, 5, 3, 3), ramp(5)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 0]},
        17,
    ),
    ("ConvTranspose", [X, ramp(4, 5, 3, 3)], {"strides": [2, 2], "pads": [1, 1, 0, 1]}, 17),
    ("ConvTranspose", [X, ramp(4, 5, 3, 3)], {"pads": [0, 0, 1, 1]}, 17),
    ("MaxPool", [X], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 17),
    ("MaxPool", [X], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 2]}, 17),
    ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 17),
    ("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, 17),
    (
        "AveragePool",
        [X],
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "strides": [2, 2]},
        17,
    ),
    ("AveragePool", [X], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}, 17),
    ("GlobalAveragePool", [X], {}, 17),
    ("GlobalMaxPool", [X], {}, 17),
    ("BatchNormalization", [X, ramp(4), ramp(4), ramp(4), ramp(4)], {"epsilon": 1e-3}, 17),
    ("InstanceNormalization", [X, ramp(4), ramp(4)], {}, 17),
    ("LayerNormalization", [X, ramp(8), ramp(8)], {}, 17),
    ("LayerNormalization", [X, ramp(6, 8)], {"axis": 2, "epsilon": 1e-3}, 17),
    ("LayerNormalization", [X, ramp(1)], {}, 17),
    ("GroupNormalization", [X, ramp(2), ramp(2)], {"num_groups": 2}, 18),
    ("GroupNormalization", [X, ramp(4), ramp(4)], {"num_groups": 2}, 21),
    ("RMSNormalization", [X, ramp(8)], {}, 23),
    ("LpNormalization", [X], {"axis": 1}, 17),
    ("Attention", [X, X, X], {"is_causal": 1}, 23),
    ("Attention", [X, P[:, :2].copy(), X[:, :2].copy(), c(ramp(6, 6))], {"scale": 0.3}, 23),
    ("Resize", [X, None, c(f(1, 1, 2, 2))], {"mode": "nearest"}, 17),
    (
        "Resize",
        [X, None, c(f(1, 1, 2, 3))],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        17,
    ),
    ("Resize", [X, None, None, c(i(2, 4, 9, 16))], {"mode": "linear"}, 17),
    (
        "Resize",
        [X, None, c(f(1, 1, 2, 2))],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        17,
    ),
    ("Resize", [X, None, c(f(1, 1, 0.5, 0.5))], {"mode": "cubic"}, 17),
    ("Resize", [X, c(f(1, 1, 2, 2))], {"mode": "nearest"}, 10),
    ("Upsample", [X, c(f(1, 1, 2, 2))], {"mode": "nearest"}, 9),
    ("QuantizeLinear", [X, c(f(0.02)[0]), c(np.uint8(128))], {}, 17),
    (
        "DequantizeLinear",
        [c(np.arange(-8, 8, dtype=np.int8).reshape(2, 8)), c(ramp(2)), c(np.array([1, -1], np.int8))],
        {"axis": 0},
        17,
    ),
    ("Celu", [X], {"alpha": 0.5}, 17),
    ("Hardmax", [X], {}, 17),
    ("ReverseSequence", [X[:, :, 0, 0].copy(), i(2, 1, 2, 1)], {}, 17),
    ("Shrink", [X], {}, 17),
]


def single(
    operator: str, inputs: list[np.ndarray | None], attributes: dict[str, Any], opset: int
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    names = ["" if value is None else f"in{index}" for index, value in enumerate(inputs)]
    given = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
    fed = {
        name: np.asarray(value)
        for name, value in given.items()
        if not isinstance(value, np.ndarray) or value.flags.writeable
    }
    constants = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in given.items() if name not in fed
    ]
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in fed.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], **attributes)],
        "single",
        values,
        [onnx.ValueInfoProto(name="y")],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), fed


def ort(proto: onnx.ModelProto, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, fed), strict=True))


def runner_of(proto: onnx.ModelProto) -> OnnxRunner:
    model = normalized(ir.from_proto(proto))
    return OnnxRunner(model, find_sites(model, Shapes.infer(model)).sites)


def assert_close(got: Tensor, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    assert got.detach().numpy().dtype == wanted.dtype
    assert tuple(got.shape) == wanted.shape
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "opset"),
    CASES,
    ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)],
)
def test_operator_agrees_with_onnx_runtime(
    operator: str, inputs: list[np.ndarray | None], attributes: dict[str, Any], opset: int
) -> None:
    proto, fed = single(operator, inputs, attributes, opset)
    got = runner_of(proto)({name: torch.from_numpy(value.copy()) for name, value in fed.items()})["y"]
    assert_close(got, ort(proto, fed)["y"], 2e-4 if operator in {"Erf", "Gelu", "Mish"} else 2e-5)


SEQUENCES = (
    "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceEmpty", "SequenceLength", "SequenceAt",
    "ConcatFromSequence",
)  # fmt: skip


def test_sequences_are_lists_of_tensors() -> None:
    node = helper.make_node
    nodes = [
        node("SequenceConstruct", ["x", "x"], ["two"]),
        node("SequenceInsert", ["two", "z", "one"], ["three"]),
        node("SequenceErase", ["three", "last"], ["rest"]),
        node("SequenceEmpty", [], ["none"]),
        node("SequenceInsert", ["none", "z"], ["alone"]),
        node("SequenceLength", ["rest"], ["count"]),
        node("SequenceAt", ["alone", "last"], ["z2"]),
        node("ConcatFromSequence", ["rest"], ["joined"], axis=1),
        node("ConcatFromSequence", ["three"], ["stacked"], axis=-1, new_axis=1),
    ]
    info = helper.make_tensor_value_info
    returned = [info(name, TensorProto.FLOAT, None) for name in ("joined", "stacked", "z2")]
    held = [numpy_helper.from_array(np.array(place), name) for name, place in (("one", 1), ("last", -1))]
    proto = helper.make_model(
        helper.make_graph(
            nodes, "g", [info("x", TensorProto.FLOAT, [2, 3]), info("z", TensorProto.FLOAT, [2, 3])],
            [*returned, info("count", TensorProto.INT64, None)], held,
        ), opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    assert {made.op_type for made in proto.graph.node} == set(SEQUENCES)
    fed = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "z": -np.ones((2, 3), np.float32)}
    got = runner_of(proto)({name: torch.from_numpy(value.copy()) for name, value in fed.items()})
    for name, wanted in ort(proto, fed).items():
        np.testing.assert_array_equal(got[name].numpy(), wanted)


def test_the_cases_cover_the_table() -> None:
    covered = {case[0] for case in CASES}
    elsewhere = (
        {"Split", "TopK", "SimplifiedLayerNormalization", "Swish"}
        | {
            "Tan",
            "Asin",
            "Acos",
            "Atan",
            "Sinh",
            "Cosh",
            "Asinh",
            "Acosh",
            "Atanh",
        }
        | set(SEQUENCES)
    )
    assert {name for name in FUNCTIONS.names() if "::" not in name} - covered - elsewhere == set()


@pytest.mark.parametrize(
    ("inputs", "attributes", "opset", "parts"),
    [
        ([c(i(1, 3))], {"axis": 1}, 17, 2),
        ([], {"axis": 3, "num_outputs": 3}, 18, 3),
        ([], {"axis": 1}, 11, 2),
        ([], {"axis": 2, "split": [1, 5]}, 11, 2),
    ],
)
def test_split(inputs: list[np.ndarray], attributes: dict[str, Any], opset: int, parts: int) -> None:
    proto, fed = single("Split", [X, *inputs], attributes, opset)
    names = [f"y{part}" for part in range(parts)]
    del proto.graph.node[0].output[:], proto.graph.output[:]
    proto.graph.node[0].output.extend(names)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    got = runner_of(proto)({"in0": torch.from_numpy(X)})
    for name, wanted in ort(proto, fed).items():
        assert_close(got[name], wanted)


def test_top_k_gives_values_and_indices() -> None:
    proto, fed = single("TopK", [X, c(i(3))], {"axis": 2}, 11)
    proto.graph.node[0].output.append("z")
    proto.graph.output.append(onnx.ValueInfoProto(name="z"))
    got = runner_of(proto)({"in0": torch.from_numpy(X)})
    for name, wanted in ort(proto, fed).items():
        assert_close(got[name], wanted)


@pytest.mark.parametrize("operator", ["Gelu", "FastGelu", "QuickGelu", "BiasGelu"])
def test_contrib_operator(operator: str) -> None:
    proto, fed = single(operator, [X] + ([ramp(8)] if operator == "BiasGelu" else []), {}, 17)
    proto.graph.node[0].domain = "com.microsoft"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    got = runner_of(proto)({name: torch.from_numpy(value) for name, value in fed.items()})["y"]
    assert_close(got, ort(proto, fed)["y"], 1e-4)


def loop_and_branch() -> onnx.ModelProto:
    """`x` through a loop that doubles it three times, then a branch that reads an outer weight."""
    float_1d = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Add", ["h", "h"], ["h2"]), helper.make_node("Identity", ["go"], ["go2"])],
        "body",
        [
            float_1d("k", TensorProto.INT64, []),
            float_1d("go", TensorProto.BOOL, []),
            float_1d("h", TensorProto.FLOAT, ["N", 4]),
        ],
        [float_1d("go2", TensorProto.BOOL, []), float_1d("h2", TensorProto.FLOAT, ["N", 4])],
    )
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["d", name], [f"out_{name}"])],
            name,
            [],
            [float_1d(f"out_{name}", TensorProto.FLOAT, ["N", 3])],
        )
        for name in ("w1", "w2")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["p"]),
        helper.make_node("Loop", ["three", "", "p"], ["d"], body=body),
        helper.make_node("ReduceSum", ["d"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["q"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Relu", ["q"], ["y"]),
    ]
    constants = {
        "w0": ramp(5, 4),
        "w1": ramp(4, 3),
        "w2": -ramp(4, 3),
        "three": np.int64(3),
        "zero": np.float32(0),
    }
    graph = helper.make_graph(
        nodes,
        "control",
        [float_1d("x", TensorProto.FLOAT, ["N", 5])],
        [float_1d("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_loop_without_layers_runs_in_onnx_runtime_and_a_branch_with_one_is_recorded(sign: float) -> None:
    proto = loop_and_branch()
    x = sign * ramp(2, 5)
    model = OnnxModel.open(proto)
    assert {site.name for site in model.sites()} == {"w0", "w1", "w2"}
    tape = model.record(Batch((torch.from_numpy(x),)))
    assert {call.name for call in tape.calls if call.name.startswith("onnx_")} == {"onnx_Loop"}
    assert set(tape.site_calls) == {"w0", "w1" if sign > 0 else "w2"}
    assert_close(tape.play().finish()["y"], ort(proto, {"x": x})["y"])


def test_replay_of_an_onnx_runtime_node_follows_its_inputs() -> None:
    proto = loop_and_branch()
    model = OnnxModel.open(proto)
    tape = model.record(Batch((torch.from_numpy(ramp(2, 5)),)))
    doubled = tape.play().fork({"w0": lambda x: 2 * (x @ torch.from_numpy(ramp(5, 4)))}).finish()
    assert torch.allclose(doubled["y"], 2 * tape.play().finish()["y"], rtol=1e-5)


def test_functions_are_inlined_on_a_copy() -> None:
    function = helper.make_function(
        "local",
        "Double",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Double", ["h"], ["y"], domain="local"),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", 1, [2, 8])], [info("y", 1, [2, 6])], [numpy_helper.from_array(ramp(8, 6), "w")]
    )
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        ir_version=8,
        functions=[function],
    )
    model = OnnxModel.open(proto)
    tape = model.record(Batch((torch.from_numpy(ramp(2, 8)),)))
    assert [call.name for call in tape.calls] == ["linear", "add"]
    assert_close(tape.play().finish()["y"], ort(proto, {"x": ramp(2, 8)})["y"])
    assert len(model.unwrap().functions) == 1


def test_omitted_output_of_a_recurrent_layer() -> None:
    proto, fed = single("LSTM", [X[:, :, :, 0], c(ramp(1, 12, 6)), c(ramp(1, 12, 3))], {"hidden_size": 3}, 17)
    proto.graph.node[0].output[:] = ["", "y"]
    assert_close(runner_of(proto)({"in0": torch.from_numpy(fed["in0"])})["y"], ort(proto, fed)["y"])


def test_unknown_operator_is_named() -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mystery", ["x"], ["y"], domain="nowhere")],
        "g",
        [info("x", 1, [2])],
        [info("y", 1, [2])],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)], ir_version=8
    )
    model = OnnxModel.open(proto)
    with pytest.raises(UnsupportedError, match="Mystery"):
        model.record(Batch((torch.zeros(2),)))
    with pytest.raises(InvalidModelError, match="ONNX Runtime refuses"):
        model.run(Batch((torch.zeros(2),)))


def test_shape_arithmetic_is_not_recorded_and_gradients_flow() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 12)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x).reshape(x.shape[0], -1, 6).mean(1))

    proto = export(Net(), (torch.randn(4, 5, 8),), ({0: "n", 1: "s"},))
    model = OnnxModel.open(proto)
    x = torch.randn(3, 7, 8)
    tape = model.record(Batch((x,)))
    assert {call.site for call in tape.calls} == {"fc", "out", None}
    assert len(tape.calls) <= 4
    runner = runner_of(proto)
    for weight in runner.weights.values():
        weight.requires_grad_()
    (output,) = runner({"x": x}).values()
    output.square().sum().backward()
    assert all(
        weight.grad is not None and float(weight.grad.abs().sum()) > 0 for weight in runner.weights.values()
    )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .reshape(b, s, w)
        )
        return x + self.mlp(x)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.Sequential(Attention(16, 4), Attention(16, 2))
        self.head = nn.Linear(16, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Hardswish(),
        nn.Conv2d(8, 6, 1),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.Softmax(-1),
    )


def recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0][:, -1])

    return Recurrent()


def export(module: nn.Module, args: tuple[Tensor, ...], dynamic: Any, **options: Any) -> onnx.ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about what it uses inside
        program = torch.onnx.export(
            module.eval(), args, dynamo=True, dynamic_shapes=dynamic, verbose=False, **options
        )
    return program.model_proto


NETWORKS = {
    "convolutional": (convolutional, (torch.randn(3, 3, 16, 16),), (torch.randn(2, 3, 16, 16),), ({0: "n"},)),
    "language": (
        Language,
        (torch.randint(0, 50, (3, 7)),),
        (torch.randint(0, 50, (2, 5)),),
        ({0: "n", 1: "s"},),
    ),
    "recurrent": (recurrent, (torch.randn(3, 5, 6),), (torch.randn(3, 5, 6),), None),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exported_network_agrees_with_torch_and_onnx_runtime(name: str) -> None:
    build, example, args, dynamic = NETWORKS[name]
    torch.manual_seed(0)
    module = build().eval()
    proto = export(module, example, dynamic)
    model = OnnxModel.open(proto)
    module = open_recurrent(module)
    modules, original = dict(module.named_modules()), open_model(module)
    assert model.sites()
    for site in model.sites():
        assert torch.equal(model.weight(site.name), original.weight(site.name)), site.name
        bias = getattr(modules[site.name], "bias", None)  # an Embedding has none
        assert (model.bias(site.name) is None) == (bias is None)
    with torch.no_grad():
        wanted = module(*args)
    (got,) = model.run(Batch(args)).values()
    (replayed,) = model.record(Batch(args)).play().finish().values()
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(replayed, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("code", "bhilqBHILQ")
def test_every_integer_of_numpy_is_one_of_torch_by_its_size(code: str) -> None:
    array = np.arange(6, dtype=np.dtype(code))
    made = from_memory(array)
    assert made.element_size() == array.itemsize
    assert made.tolist() == array.tolist()
