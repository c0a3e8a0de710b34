"""Chains of layers as fused operators in an ONNX model: found, measured, written, and opened again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import tdpass.formats  # noqa: F401 - fills the registry
from tdpass.cli import main
from tdpass.errors import KernelError
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.fusing import choose
from tdpass.fusing.find import find_chains
from tdpass.kernels.native import onnx_ops_path
from tdpass.models.base import Batch
from tdpass.models.onnx.fused import fuse
from tdpass.models.onnx.fused.links import NodeReader
from tdpass.models.onnx.model import OnnxModel
from tdpass.models.onnx.operators import session
from tdpass.models.onnx.operators.fused import DOMAIN, REGISTER

RNG = np.random.default_rng(0)
X = torch.randn(3, 8, 10, 9, generator=torch.Generator().manual_seed(0))


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)


def node(
    operator: str, inputs: str, output: str = "y", domain: str = "", **attributes: object
) -> onnx.NodeProto:
    return helper.make_node(
        operator, inputs.split(), [output], name=f"{output}/{operator.lower()}", domain=domain, **attributes
    )


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    x: tuple[int | str, ...],
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    if ir_version < 4:
        given += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
            for name, array in constants.items()
        ]
    graph = helper.make_graph(
        nodes, "g", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    )


def block(**options: int) -> onnx.ModelProto:
    """A residual block of two convolutions, and a head."""
    nodes = [
        node("Conv", "x first.weight first.bias", "a", pads=[1, 1, 1, 1]),
        node("Relu", "a", "b"),
        node("Conv", "b second.weight second.bias", "c", pads=[1, 1, 1, 1]),
        node("Add", "x c", "d"),
        node("Relu", "d", "e"),
        node("GlobalAveragePool", "e", "f"),
        node("Flatten", "f", "g"),
        node("Gemm", "g head.weight head.bias", "y", transB=1),
    ]
    constants = {
        "first.weight": weight(8, 8, 3, 3),
        "first.bias": weight(8),
        "second.weight": weight(8, 8, 3, 3),
        "second.bias": weight(8),
    }
    return model_of(
        nodes,
        {**constants, "head.weight": weight(12, 8), "head.bias": weight(12)},
        ("N", 8, "H", "W"),
        **options,
    )


def factored(proto: onnx.ModelProto) -> OnnxModel:
    """The block with its convolutions and its head factored."""
    model = OnnxModel.open(proto)
    for site in model.sites():
        name, rank = ("svd", (3,)) if site.kind == "linear" else ("tucker2", (5, 4))
        factors = FORMATS.get(name).factorize(model.weight(site.name), site, rank)
        model.replace(site.name, Layer(site, Form(name, rank), factors, model.bias(site.name)))
    return model


def op_types(proto: ir.Model | onnx.ModelProto) -> list[str]:
    nodes = proto.graph if isinstance(proto, ir.Model) else proto.graph.node
    return [node.op_type for node in nodes]


def ignore(*_: str) -> None:
    pass


FUSED = ["ConvChain3BiasRelu", "ConvChain3BiasAddRelu", "GlobalAveragePool", "Flatten", "LinearChain2Bias"]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (23, 10), (9, 3)])
def test_a_model_keeps_its_outputs_names_and_shapes(opset: int, ir_version: int, tmp_path: Path) -> None:
    model = factored(block(opset=opset, ir_version=ir_version))
    before, plain = model.run(Batch((X,))), model.unwrap()
    said: list[str] = []
    assert model.fuse(said.append, lambda name, why: pytest.fail(f"{name}: {why}"), Batch((X,)))
    assert said == [
        (
            "3 chains became one operator each, 4.50 to 9.00 times as fast alone; the model, and all times "
            f"here, need {REGISTER}"
        )
    ]
    model.check()
    proto = model.unwrap()
    assert isinstance(proto, onnx.ModelProto)
    assert isinstance(plain, onnx.ModelProto)
    assert [name for name in op_types(proto) if name != "Constant"] == FUSED
    assert proto.graph.output == plain.graph.output
    assert proto.ir_version == max(ir_version, 8)
    assert {entry.domain: entry.version for entry in proto.opset_import}.get("") == opset
    path = tmp_path / "fused.onnx"
    model.save(path, {})
    onnx.checker.check_model(str(path), full_check=True)
    after = model.run(Batch((X,)))
    assert after.keys() == before.keys()
    assert torch.allclose(after["y"], before["y"], rtol=1e-5, atol=1e-5)
    bare = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"x": X.numpy()}
    )[0]
    assert np.allclose(bare, before["y"], rtol=1e-5, atol=1e-5)
    assert np.allclose(
        ReferenceEvaluator(str(path)).run(None, {"x": X.numpy()})[0], before["y"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("verb", ["compress", "deploy", "bench"])
def test_the_command_line_says_what_a_fused_file_needs(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, fused = tmp_path / "block.onnx", tmp_path / "fused.onnx"
    onnx.save(block(), str(given))
    np.save(tmp_path / "x.npy", X.numpy())
    data = ["--data", str(tmp_path / "x.npy")]
    words = {
        "compress": [
            "compress",
            str(given),
            *data,
            "--format",
            "tucker2",
            "--pipeline",
            "plan{params=0.8},factorize,fuse-kernels",
            "-o",
            str(fused),
        ],
        "deploy": ["deploy", str(fused), "-o", str(tmp_path / "copy.onnx")],
        "bench": ["bench", str(given), str(fused), *data, "--rounds", "1", "--runtime", "onnxruntime"],
    }
    for each in dict.fromkeys(["compress", verb]):
        assert main([*words[each], "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
    (note,) = said["notes"]
    assert REGISTER in note
    assert str(onnx_ops_path()) in note
    assert main(["deploy", str(given), "-o", str(tmp_path / "plain.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


@pytest.mark.usefixtures("always")
def test_a_file_with_fused_operators_opens_again(tmp_path: Path) -> None:
    model = factored(block())
    model.fuse(ignore, ignore, Batch((X,)))
    model.save(tmp_path / "fused.onnx", {})
    again = OnnxModel.open(tmp_path / "fused.onnx")
    assert again.sites() == []
    assert len(again.declined()) == 3
    assert set(again.declined().values()) >= {
        "operator com.tdpass::ConvChain3BiasRelu is not one that tdpass rewrites"
    }
    assert again.params() == model.params()
    expected = model.run(Batch((X,)))["y"]
    assert torch.equal(again.run(Batch((X,)))["y"], expected)
    played = again.record(Batch((X,))).play().finish()
    assert isinstance(played, dict)
    assert torch.allclose(played["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_fusing_again_changes_nothing_and_replacing_undoes_one_layer() -> None:
    model = factored(block())
    assert model.fuse(ignore, ignore, Batch((X,)))
    assert not model.fuse(ignore, ignore, Batch((X,)))
    site = model.sites()[0]
    factors = FORMATS.get("tucker2").factorize(model.weight(site.name), site, (3, 3))
    model.replace(site.name, Layer(site, Form("tucker2", (3, 3)), factors, model.bias(site.name)))
    proto = model.unwrap()
    assert isinstance(proto, onnx.ModelProto)
    assert op_types(proto) == ["Conv", "Conv", "Conv", "Relu", *FUSED[1:]]
    twin = model.clone()
    assert twin.fuse(ignore, ignore, Batch((X,)))
    assert op_types(twin._built) == FUSED
    assert op_types(model._built) == op_types(proto)


def test_real_times_decide_and_leave_the_result_alone() -> None:
    model = factored(block())
    before = model.run(Batch((X,)))["y"]
    said: list[str] = []
    model.fuse(said.append, lambda name, why: said.append(f"{name}: {why}"), Batch((X,)))
    assert said
    assert torch.allclose(model.run(Batch((X,)))["y"], before, rtol=1e-5, atol=1e-5)


def test_what_is_slower_stays_as_it_is(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        choose, "seconds_of", lambda calls, *_: {key: 1.0 if key == "plain" else 2.0 for key in calls}
    )
    model, declined = factored(block()), dict[str, str]()
    assert not model.fuse(ignore, declined.__setitem__, Batch((X,)))
    assert declined == dict.fromkeys(
        ("first", "second", "head"), "as one operator it takes 2.00 times as long"
    )


def test_a_gain_that_the_model_does_not_show_is_declined(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (choose, fuse):
        monkeypatch.setattr(
            module, "seconds_of", lambda calls, *_: {key: 2.0 if key == "plain" else 1.0 for key in calls}
        )
    model, declined = factored(block()), dict[str, str]()
    assert not model.fuse(ignore, declined.__setitem__, Batch((X,)))
    assert (
        declined["first"]
        == "as one operator it takes 0.50 times as long alone, and the model is no faster for it"
    )


@pytest.mark.usefixtures("always")
def test_without_samples_unknown_sizes_are_declined() -> None:
    model, declined = factored(block()), dict[str, str]()
    assert model.fuse(ignore, declined.__setitem__)
    assert declined == dict.fromkeys(
        ("first", "second"), "the size of its input is not known; pass data= or example_inputs="
    )
    assert op_types(model._built)[-1] == "LinearChain2Bias"


def test_without_the_library_nothing_is_fused_and_files_still_run(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = factored(block())
    model.fuse(ignore, ignore, Batch((X,)))
    expected = model.run(Batch((X,)))["y"]

    def absent() -> Path:
        raise KernelError("there is no library")

    for module in (fuse, session):
        monkeypatch.setattr(module, "onnx_ops_path", absent)
    assert torch.allclose(model.clone().run(Batch((X,)))["y"], expected, rtol=1e-5, atol=1e-5)
    said: list[str] = []
    assert model.fuse(said.append, ignore, Batch((X,)))  # back to plain layers
    assert said == ["there is no library"]
    assert DOMAIN not in model._built.opset_imports


def test_sessions_register_the_library_for_models_that_use_it(always: None, tmp_path: Path) -> None:
    model = factored(block())
    model.save(tmp_path / "plain.onnx", {})
    model.fuse(ignore, ignore, Batch((X,)))
    model.save(tmp_path / "fused.onnx", {})
    for name, uses in (("plain", False), ("fused", True)):
        path = tmp_path / f"{name}.onnx"
        assert session.register_fused_ops(onnxruntime.SessionOptions(), str(path)) is uses
        assert session.register_fused_ops(onnxruntime.SessionOptions(), path.read_bytes()) is uses


def gelu(one: str) -> list[onnx.NodeProto]:
    """As the older exporter writes it, where that is one."""
    return [
        node("Div", "b root", "s"),
        node("Erf", "s", "e"),
        node("Add", f"e {one}", "t"),
        node("Mul", "b t", "u"),
        node("Mul", "u half", "y"),
    ]


@pytest.mark.parametrize(
    ("opset", "tail", "expected"),
    [
        (17, [], "ConvChain2"),
        (17, [node("Relu", "b", "y")], "ConvChain2Relu"),
        (17, [node("Sigmoid", "b", "s"), node("Mul", "b s", "y")], "ConvChain2Silu"),
        (24, [node("Swish", "b", "y")], "ConvChain2Silu"),
        (20, [node("Gelu", "b", "y")], "ConvChain2Gelu"),
        (20, [node("Gelu", "b", "y", approximate="tanh")], "ConvChain2"),
        (17, [node("Gelu", "b", "y", "com.microsoft")], "ConvChain2Gelu"),
        (17, gelu("one"), "ConvChain2Gelu"),
        (17, gelu("half"), "ConvChain2"),
        (17, [node("Clip", "b zero six", "y")], "ConvChain2Clamp"),
        (17, [node("Clip", "b half one", "y")], "ConvChain2Clamp"),
        (17, [node("Clip", "b one zero", "y")], "ConvChain2Clamp"),
        (17, [node("Clip", "b zero", "y")], "ConvChain2Relu"),
        (17, [node("Clip", "b", "y")], "ConvChain2"),
        (17, [node("ReduceMax", "x", "t", keepdims=0), node("Clip", "b zero t", "y")], "ConvChain2"),
        (17, [node("Add", "b x", "s"), node("Clip", "s zero six", "y")], "ConvChain2AddClamp"),
        (10, [node("Clip", "b", "y", min=-0.5, max=0.25)], "ConvChain2Clamp"),
        (10, [node("Clip", "b", "y", max=0.25)], "ConvChain2Clamp"),
        (11, [node("Clip", "b zero half", "y")], "ConvChain2Clamp"),
        (17, [node("Relu", "b", "s"), node("Min", "s half", "y")], "ConvChain2Clamp"),
        (17, [node("Max", "half b", "s"), node("Min", "s one", "y")], "ConvChain2Clamp"),
        (17, [node("Min", "b row", "y")], "ConvChain2"),
        (17, [node("Add", "b x", "s"), node("Relu", "s", "y")], "ConvChain2AddRelu"),
        (17, [node("Add", "x b", "y")], "ConvChain2Add"),
        (17, [node("Relu", "b", "s"), node("Add", "s x", "y")], "ConvChain2Relu"),
        (17, [node("Add", "b row", "y")], "ConvChain2"),
        (17, [node("Relu", "b", "s"), node("Add", "s b", "y")], "ConvChain2"),
        (17, [node("Add", "b b", "y")], "ConvChain2"),
    ],
)
def test_what_follows_a_chain(always: None, opset: int, tail: list[onnx.NodeProto], expected: str) -> None:
    last = "b" if tail else "y"
    nodes = [node("Conv", "x u.weight", "a"), node("Conv", "a v.weight", last, pads=[1, 1, 1, 1]), *tail]
    constants = {"u.weight": weight(4, 8, 1, 1), "v.weight": weight(8, 4, 3, 3), "row": weight(8, 1, 1)}
    constants |= {
        "root": np.float32(np.sqrt(2)).reshape(()),
        "half": np.float32(0.5).reshape(()),
        "one": np.ones((), np.float32),
        "zero": np.zeros((), np.float32),
        "six": np.float32(6).reshape(()),
    }
    model = OnnxModel.open(model_of(nodes, constants, ("N", 8, "H", "W"), opset))
    before = model.run(Batch((X,)))["y"]
    assert model.fuse(ignore, ignore, Batch((X,)))
    assert expected in op_types(model._built)
    model.check()
    assert torch.allclose(model.run(Batch((X,)))["y"], before, rtol=1e-5, atol=1e-5)
    assert torch.allclose(model.run(Batch((X[:1],)))["y"], before[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("Conv", "x u.weight u.bias", "a"), node("Conv", "a v.weight")], "a bias between"),
        (
            [
                node("Conv", "x u.weight", "a"),
                node("Conv", "a v.weight", "b"),
                node("Concat", "a b", "y", axis=1),
            ],
            "two readers",
        ),
        (
            [node("Conv", "x u.weight", "a"), node("Relu", "a", "b"), node("Conv", "b v.weight")],
            "an activation between",
        ),
        (
            [node("Conv", "x u.weight", "a", auto_pad="SAME_UPPER"), node("Conv", "a v.weight")],
            "pads that depend on the size",
        ),
    ],
)
def test_what_is_no_chain(nodes: list[onnx.NodeProto], reason: str) -> None:
    constants = {"u.weight": weight(4, 8, 1, 1), "u.bias": weight(4), "v.weight": weight(8, 4, 1, 1)}
    assert find_chains(NodeReader(OnnxModel.open(model_of(nodes, constants, ("N", 8, 6, 6)))._built)) == [], (
        reason
    )


@pytest.mark.usefixtures("always")
def test_matrices_in_a_row_on_three_axes(tmp_path: Path) -> None:
    tokens: Tensor = torch.randn(2, 5, 12)
    nodes = [
        node("MatMul", "x u.weight", "a"),
        node("MatMul", "a v.weight", "b"),
        node("Add", "b v.bias", "c"),
        node("Add", "c x", "d"),
        node("Sigmoid", "d", "e"),
        node("Mul", "d e", "f"),
        node("MatMul", "f u.weight", "g"),
        node("MatMul", "g v.weight", "y"),
    ]
    constants = {"u.weight": weight(12, 3), "v.weight": weight(3, 12), "v.bias": weight(12)}
    model = OnnxModel.open(model_of(nodes, constants, ("N", "T", 12)))
    before = model.run(Batch((tokens,)))["y"]
    assert model.fuse(ignore, ignore, Batch((tokens,)))
    assert op_types(model._built) == ["LinearChain2BiasAddSilu", "LinearChain2"]
    assert set(model._built.graph.initializers) == set(constants)
    assert torch.allclose(model.run(Batch((tokens,)))["y"], before, rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "m.onnx", {})
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
