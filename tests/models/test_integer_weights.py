"""Weights that come as integers, or cast: sites in that form, whose factors keep it, and left byte for byte where not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import node

import tdpass
from tdpass.models import open_model

ROWS, INPUTS, OUTPUTS = 16, 64, 48
Arrays = dict[str, np.ndarray]
_draw = np.random.default_rng(0)


def weight() -> np.ndarray:
    """A matrix of low rank, `[i, o]`."""
    parts = _draw.standard_normal((INPUTS, 3)), _draw.standard_normal((3, OUTPUTS))
    return (parts[0] @ parts[1] / 14).astype(np.float32)


def coded(numbers: np.ndarray, axis: int | None, kind: type = np.int8, middle: int = 0) -> Arrays:
    along = None if axis is None else tuple(k for k in range(numbers.ndim) if k != axis)
    scale = (np.abs(numbers).max(along) / 100).astype(np.float32)
    steps = scale if axis is None else np.expand_dims(scale, along or ())
    codes = np.round(numbers / steps) + middle
    return {"w": codes.astype(kind), "s": scale, "z": np.full(scale.shape, middle, kind)}


GRIDS: Arrays = {
    "xs": np.array(0.03, np.float32), "xz": np.array(128, np.uint8),
    "ys": np.array(0.05, np.float32), "yz": np.array(128, np.uint8),
}  # fmt: skip
QDQ = [node("DequantizeLinear", "w s z", "f", axis=1), node("MatMul", "x f", "p"), node("Add", "p b", "h")]
CODED = node("QuantizeLinear", "x xs xz", "q")
KINDS = {
    "by channel": (QDQ, coded(weight(), 1), "int8"),
    "one scale": (QDQ, coded(weight(), None), "int8/tensor"),
    "unsigned": (QDQ, coded(weight(), 1, np.uint8, 128), "int8"),
    "zero points": (QDQ, coded(weight(), 1, np.int8, 3), "int8/zero"),
    "sixteen bits": (QDQ, coded(weight(), 1, np.int16), "int16"),
    "QLinearMatMul": (
        [
            CODED,
            node("QLinearMatMul", "q xs xz w s z ys yz", "c"),
            node("DequantizeLinear", "c ys yz", "p"),
            node("Add", "p b", "h"),
        ],
        {**coded(weight(), 1), **GRIDS},
        "int8",
    ),
}
each = pytest.mark.parametrize("kind", KINDS)


def model(kind: str) -> onnx.ModelProto:
    """A layer of integers, then one of numbers that nothing changes."""
    nodes, arrays, _ = KINDS[kind]
    bias = np.linspace(-1, 1, OUTPUTS).astype(np.float32)
    graph = helper.make_graph(
        [*nodes, node("Relu", "h", "y")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", OUTPUTS])],
        [numpy_helper.from_array(array, name) for name, array in {**arrays, "b": bias}.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def data() -> torch.Tensor:
    return torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1))


def answer(made: onnx.ModelProto) -> torch.Tensor:
    session = onnxruntime.InferenceSession(made.SerializeToString())
    return torch.from_numpy(session.run(None, {"x": data().numpy()})[0])


def stored(made: onnx.ModelProto) -> int:
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in made.graph.initializer)


def compressed(kind: str, share: float, **options: object) -> tdpass.Artifact:
    return tdpass.compress(
        model(kind), {"bytes": share}, data(), effort="fast", progress=False, cache=False, **options
    )


@each
def test_its_factors_are_integers_too_and_fewer_bytes(kind: str, tmp_path: Path) -> None:
    made = compressed(kind, 0.6, formats=["svd"])
    (choice,) = made.plan
    assert (choice.format, choice.form.numbers) == ("svd", (KINDS[kind][2],))
    assert made.report.final.bytes <= 0.6 * made.report.original.bytes
    given, got = answer(model(kind)), answer(made.model)
    assert float((got - given).norm()) < 0.03 * float(given.norm())
    made.save(tmp_path / "small.onnx")
    assert stored(onnx.load(tmp_path / "small.onnx")) < stored(model(kind))
    assert torch.equal(answer(onnx.load(tmp_path / "small.onnx")), got)


@each
def test_it_is_left_byte_for_byte_where_nothing_is_asked(kind: str) -> None:
    made, given = compressed(kind, 1.0).model, model(kind)
    assert [n.SerializeToString() for n in made.graph.node] == [
        n.SerializeToString() for n in given.graph.node
    ]
    held = {tensor.name: tensor.SerializeToString() for tensor in given.graph.initializer}
    assert {tensor.name: tensor.SerializeToString() for tensor in made.graph.initializer} == held


@each
def test_the_form_that_it_is_in_stands_for_its_weight(kind: str) -> None:
    opened = open_model(model(kind))
    (site,) = opened.sites()
    layer = opened.layer(site.name)
    assert layer is not None
    assert str(layer.form) == f"dense {KINDS[kind][2]}"
    torch.testing.assert_close(layer.reconstruct(), opened.weight(site.name), rtol=1e-6, atol=1e-7)


def test_the_bias_of_integers_is_the_layers() -> None:
    codes = coded(_draw.standard_normal((8, 6, 3, 3)).astype(np.float32), 0)
    arrays = {**codes, "b": np.arange(8, dtype=np.int32), "t": codes["s"] * np.float32(0.5)}
    graph = helper.make_graph(
        [node("DequantizeLinear", "w s z", "f", axis=0), node("DequantizeLinear", "b t", "g", axis=0),
         node("Conv", "x f g")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8, 3, 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opened = open_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    wanted = torch.from_numpy((arrays["b"] * arrays["t"]).astype(np.float32))
    torch.testing.assert_close(opened.bias("w"), wanted)


def test_factors_of_a_cast_weight_keep_its_type() -> None:
    numbers = weight().astype(np.float16)
    graph = helper.make_graph(
        [node("Cast", "w", "f", to=TensorProto.FLOAT), node("MatMul", "x f")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, OUTPUTS])],
        [numpy_helper.from_array(numbers, "w")],
    )  # fmt: skip
    given = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = tdpass.compress(given, {"params": 0.5}, data(), effort="fast", progress=False, cache=False)
    factors = [tensor for tensor in made.model.graph.initializer if len(tensor.dims) == 2]
    assert {tensor.data_type for tensor in factors} == {TensorProto.FLOAT16}
    assert float((answer(made.model) - answer(given)).norm()) < 1e-2 * float(answer(given).norm())
