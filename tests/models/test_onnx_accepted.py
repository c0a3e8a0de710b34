"""Graphs that are not in the form that the checker wants, but that ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import model_of, node, weight

import tdpass
from tdpass.errors import InvalidModelError
from tdpass.models import Batch
from tdpass.models.onnx.model import OnnxModel

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def expected(proto: onnx.ModelProto, x: torch.Tensor = X) -> torch.Tensor:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def holds(source: object, wanted: torch.Tensor) -> None:
    """The model answers as ONNX Runtime does, run and recorded, and is compressed to its budget."""
    model = OnnxModel.open(source)
    assert torch.allclose(model.run(Batch((X,)))["y"], wanted, atol=1e-5)
    assert torch.allclose(model.record(Batch((X,))).play().finish()["y"], wanted, atol=1e-5)
    result = tdpass.compress(source, {"macs": 0.7}, X, formats=["svd"], pipeline="plan,factorize,verify")
    assert result.report.final.macs <= 0.7 * result.report.original.macs


def two_layers(
    middle: list[onnx.NodeProto], functions: list[onnx.FunctionProto] | None = None
) -> onnx.ModelProto:
    """Two products with nodes from h to r between them."""
    rng = np.random.default_rng(0)
    constants = {
        "a": weight(16, 24, rng=rng),
        "c": weight(24, rng=rng),
        "b": weight(24, 8, rng=rng),
        "d": weight(8, rng=rng),
    }
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", size))]
        for name, size in (("x", 16), ("y", 8))
    )
    nodes = [node("Gemm", "x a c", "h"), *middle, node("Gemm", "r b d")]
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions or [])


@pytest.mark.parametrize("kind", ["proto", "path", "ir"])
def test_nodes_in_any_order_are_sorted(kind: str, tmp_path: Path) -> None:
    proto = two_layers([node("Relu", "h", "r")])
    wanted = expected(proto)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([nodes[2], nodes[0], nodes[1]])
    assert torch.equal(expected(proto), wanted)
    onnx.save(proto, tmp_path / "model.onnx")
    holds({"proto": proto, "path": tmp_path / "model.onnx", "ir": ir.from_proto(proto)}[kind], wanted)
    assert [each.output[0] for each in proto.graph.node] == ["y", "h", "r"]


def test_a_cycle_is_an_error() -> None:
    proto = two_layers([node("Add", "h y", "r")])
    with pytest.raises(InvalidModelError, match="cycle"):
        OnnxModel.open(proto)


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_a_local_function_may_name_another_opset_as_far_as_its_operators_are_those_of_the_model(
    opset: int,
) -> None:
    body = [
        node("Relu", "fx", "fa"),
        helper.make_node("ReduceMean", ["fa"], ["fm"], axes=[1], keepdims=1),
        node("Sub", "fa fm", "fy"),
    ]
    function = helper.make_function(
        "local", "Centred", ["fx"], ["fy"], body, [helper.make_opsetid("", opset)]
    )
    proto = two_layers([helper.make_node("Centred", ["h"], ["r"], domain="local")], [function])
    holds(proto, expected(proto))


def test_a_local_function_of_operators_that_the_model_lacks_is_an_error() -> None:
    axes = helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([1])))
    body = [axes, node("ReduceMean", "fx axes", "fy", keepdims=1)]
    function = helper.make_function("local", "Mean", ["fx"], ["fy"], body, [helper.make_opsetid("", 18)])
    with pytest.raises(InvalidModelError, match="ReduceMean"):
        OnnxModel.open(two_layers([helper.make_node("Mean", ["h"], ["r"], domain="local")], [function]))


def with_data_in_a_function(folder: Path, location: str) -> tuple[Path, torch.Tensor]:
    """A model whose local function holds a matrix in a data file, and what it answers."""
    matrix = weight(24, 24, rng=np.random.default_rng(1))
    body = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(matrix, "k")),
        node("MatMul", "fx k", "fy"),
    ]
    function = helper.make_function("local", "Turn", ["fx"], ["fy"], body, [helper.make_opsetid("", 17)])
    proto = two_layers([helper.make_node("Turn", ["h"], ["r"], domain="local")], [function])
    wanted = expected(proto)
    stored = proto.functions[0].node[0].attribute[0].t
    (folder / location).write_bytes(stored.raw_data)
    onnx.external_data_helper.set_external_data(stored, location, 0, matrix.nbytes)
    stored.ClearField("raw_data")
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx", wanted


def test_a_local_function_may_hold_external_data(tmp_path: Path) -> None:
    path, wanted = with_data_in_a_function(tmp_path, "k.data")
    holds(path, wanted)
    (tmp_path / "out").mkdir()
    tdpass.compress(path, {"macs": 0.7}, X, formats=["svd"], pipeline="plan,factorize").save(
        tmp_path / "out" / "small.onnx"
    )
    small = OnnxModel.open(tmp_path / "out" / "small.onnx").run(Batch((X,)))["y"]
    assert float((small - wanted).norm() / wanted.norm()) < 0.9


def test_external_data_of_a_local_function_is_checked_as_all_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path, _ = with_data_in_a_function(tmp_path / "model", "../k.data")
    with pytest.raises(InvalidModelError, match="outside of the model's folder"):
        OnnxModel.open(path)
    path, _ = with_data_in_a_function(tmp_path / "model", "k.data")
    (tmp_path / "model" / "k.data").write_bytes(b"short")
    with pytest.raises(InvalidModelError, match="cut short"):
        OnnxModel.open(path)


@pytest.mark.parametrize("left", [False, True], ids=["weight right", "weight left"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (1, 24), (24, 1), (24, 24)])
def test_a_third_operand_of_any_shape_is_added_as_it_was(shape: tuple[int, ...], left: bool) -> None:
    rng = np.random.default_rng(2)
    constants = {
        "w": weight(24, 24, rng=rng),
        "c": np.asarray(rng.standard_normal(shape), np.float32),
        "v": weight(24, 24, rng=rng),
    }
    gemm = node("Gemm", "w x c" if left else "x w c", "h", beta=0.5)
    proto = model_of([gemm, node("Relu", "h", "r"), node("Gemm", "r v")], constants, (24, 24))
    x = torch.randn(24, 24, generator=torch.Generator().manual_seed(3))
    exact = tdpass.compress(proto, {"max_error": 1e-6}, x, formats=["svd"], pipeline="plan,factorize,verify")
    assert exact.report.checks["relative_difference"] < 1e-4
    result = tdpass.compress(proto, {"macs": 0.7}, x, formats=["svd"])
    assert isinstance(result.model, onnx.ModelProto)
    wanted = expected(proto, x)
    gap = float((expected(result.model, x) - wanted).norm() / wanted.norm())
    assert 0 < gap < 1
    assert gap == pytest.approx(result.report.checks["relative_difference"], rel=1e-3)
