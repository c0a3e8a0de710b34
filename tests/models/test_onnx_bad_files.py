"""Damaged, hostile and merely odd files: one error each, nothing hangs, no source file is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import tdpass.formats  # noqa: F401 - fills the registry
from tdpass.errors import InvalidModelError, TdpassError, UnsupportedError, UsageError
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel

pytestmark = pytest.mark.timeout(25)
WEIGHT = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)


def sound(weight: np.ndarray = WEIGHT, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    values = [info("x", TensorProto.FLOAT, ["N", 64])], [info("y", TensorProto.FLOAT, ["N", 48])]
    graph = helper.make_graph(nodes, "g", *values, [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def conv(**attributes: object) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [info("y", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def changed(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        proto = sound()
        edit(proto)
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        return folder / "m.onnx"

    return write


def raw(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "m.onnx").write_bytes(content)
        return folder / "m.onnx"

    return write


def external(edit: Callable[[onnx.TensorProto, Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "m.onnx"
        onnx.save(sound(), path, save_as_external_data=True, location="m.data", size_threshold=0)
        proto = onnx.load(path, load_external_data=False)
        edit(proto.graph.initializer[0], folder)
        path.write_bytes(proto.SerializeToString())
        return path

    return write


def entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    kept = [pair for pair in tensor.external_data if pair.key != key]
    del tensor.external_data[:]
    tensor.external_data.extend([*kept, onnx.StringStringEntryProto(key=key, value=value)])


def moved(to: str, link: Callable[[Path, Path], object]) -> Callable[[onnx.TensorProto, Path], None]:
    def edit(_tensor: onnx.TensorProto, folder: Path) -> None:
        target = folder / to
        target.parent.mkdir(exist_ok=True)
        (folder / "m.data").rename(target)
        link(target, folder / "m.data")

    return edit


def into_fifo(_tensor: onnx.TensorProto, folder: Path) -> None:
    (folder / "m.data").unlink()
    os.mkfifo(folder / "m.data")


def outside(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    return external(moved("../elsewhere.data", lambda target, name: name.symlink_to(target)))(inner)


def deep(levels: int) -> bytes:
    """An If inside an If inside an If.

    Put together as bytes, since the protobuf library refuses to copy what it refuses to read.
    """

    def message(field: int, content: bytes) -> bytes:
        length, size = b"", len(content)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([field << 3 | 2]) + length + bytes([size]) + content

    node = helper.make_node("Identity", ["h"], ["o"]).SerializeToString()
    for _ in range(levels):
        graph = (
            message(1, node)
            + message(2, b"g")
            + helper.make_graph([], "", [], [onnx.ValueInfoProto(name="o")]).SerializeToString()
        )
        branch = message(5, message(1, b"then_branch") + message(6, graph) + b"\xa0\x01\x05")
        node = message(1, b"c") + message(2, b"o") + message(4, b"If") + branch
    proto = sound()
    proto.graph.node.pop()
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    return proto.SerializeToString() + message(7, message(1, node))


def recursive(proto: onnx.ModelProto) -> None:
    body = [helper.make_node("Again", ["a"], ["b"], domain="local")]
    proto.functions.append(
        helper.make_function(
            "local",
            "Again",
            ["a"],
            ["b"],
            body,
            [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        )
    )
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.graph.node[1].CopyFrom(helper.make_node("Again", ["h"], ["y"], domain="local"))


def dims(*shape: int) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].dims[:] = shape

    return edit


def swap_nodes(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0], proto.graph.node[1].input[0] = "y", "h"


BAD: dict[str, Callable[[Path], Path]] = {
    "missing": lambda folder: folder / "none.onnx",
    "folder": lambda folder: folder,
    "empty": raw(b""),
    "truncated": raw(sound().SerializeToString()[:-2000]),
    "truncated_early": raw(sound().SerializeToString()[:7]),
    "random_bytes": raw(np.random.default_rng(1).bytes(5000)),
    "text": raw(b"this is not a model"),
    "huge_dims": changed(dims(2**40, 2**20)),
    "short_raw": changed(lambda p: setattr(p.graph.initializer[0], "raw_data", b"\0" * 100)),
    "long_raw": changed(
        lambda p: setattr(p.graph.initializer[0], "raw_data", p.graph.initializer[0].raw_data + b"\0" * 100)
    ),
    "no_data": changed(lambda p: p.graph.initializer[0].ClearField("raw_data")),
    "negative_dims": changed(dims(-64, -48)),
    "bad_dtype": changed(lambda p: setattr(p.graph.initializer[0], "data_type", 999)),
    "cycle": changed(swap_nodes),
    "self_loop": changed(lambda p: p.graph.node[1].input.__setitem__(0, "y")),
    "missing_initializer": changed(lambda p: p.graph.initializer.pop()),
    "shape_mismatch": changed(dims(48, 64)),
    "duplicate_output": changed(lambda p: p.graph.node[1].output.__setitem__(0, "h")),
    "duplicate_initializer": changed(lambda p: p.graph.initializer.append(p.graph.initializer[0])),
    "opset_999": changed(lambda p: setattr(p.opset_import[0], "version", 999)),
    "opset_6": changed(lambda p: setattr(p.opset_import[0], "version", 6)),
    "no_opset": changed(lambda p: p.opset_import.pop()),
    "ir_999": changed(lambda p: setattr(p, "ir_version", 999)),
    "no_ir": changed(lambda p: p.ClearField("ir_version")),
    "no_graph": changed(lambda p: p.ClearField("graph")),
    "unknown_operator": changed(lambda p: setattr(p.graph.node[1], "op_type", "NoSuchOperator")),
    "recursive_function": changed(recursive),
    "deeply_nested": raw(deep(60)),
    "group_0": raw(conv(group=0).SerializeToString()),
    "stride_0": raw(conv(strides=[0, 1]).SerializeToString()),
    "dilation_negative": raw(conv(dilations=[1, -1]).SerializeToString()),
    "external_parent": external(lambda t, _: entry(t, "location", "../m.data")),
    "external_absolute": external(lambda t, folder: entry(t, "location", str(folder / "m.data"))),
    "external_symlink": outside,
    "external_hard_link": external(moved("other/x.data", lambda target, name: name.hardlink_to(target))),
    "external_missing": external(lambda _, folder: (folder / "m.data").unlink()),
    "external_short": external(lambda _, folder: (folder / "m.data").write_bytes(b"\0" * 50)),
    "external_wrong_length": external(lambda t, _: entry(t, "length", "8")),
    "external_negative_offset": external(lambda t, _: entry(t, "offset", "-4")),
    "external_offset_not_a_number": external(lambda t, _: entry(t, "offset", "abc")),
    "external_fifo": external(into_fifo),
    "external_folder": external(
        lambda t, folder: ((folder / "m.data").unlink(), (folder / "m.data").mkdir())
    ),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    path = BAD[name](tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InvalidModelError) as caught:
        OnnxModel.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message  # ends with what to do next
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    ["huge_dims", "long_raw", "cycle", "missing_initializer", "opset_999", "group_0", "recursive_function"],
)
def test_bad_proto_is_refused(name: str, tmp_path: Path) -> None:
    proto = onnx.load(BAD[name](tmp_path), load_external_data=False)
    with pytest.raises(InvalidModelError):
        OnnxModel.open(proto)


def test_proto_without_its_external_data_is_refused(tmp_path: Path) -> None:
    path = external(lambda *_: None)(tmp_path)
    with pytest.raises(InvalidModelError, match="external file"):
        OnnxModel.open(onnx.load(path, load_external_data=False))


def test_bad_ir_model_is_refused() -> None:
    model = ir.from_proto(sound())
    model.graph[0].replace_input_with(0, model.graph[1].outputs[0])
    with pytest.raises(InvalidModelError):
        OnnxModel.open(model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_when_read(value: float) -> None:
    weight = WEIGHT.copy()
    weight[3, 4] = value
    model = OnnxModel.open(sound(weight))
    with pytest.raises(InvalidModelError, match="1 of 3072 numbers of 'w'"):
        model.weight("w")


def test_empty_weight_is_declined() -> None:
    proto = sound(np.zeros((64, 0), np.float32))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 0
    model = OnnxModel.open(proto)
    assert model.declined() == {"w": "the weight is empty"}


def test_sparse_and_training_models_are_unsupported() -> None:
    sparse = sound()
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    sparse.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 5])), [64, 48])
    )
    sparse.graph.initializer.pop()
    training = sound()
    training.training_info.add()
    for proto in (sparse, training):
        with pytest.raises(UnsupportedError):
            OnnxModel.open(proto)


@pytest.mark.parametrize("source", [None, 3, b"bytes", {"a": 1}, torch.zeros(2)])
def test_other_types_are_refused(source: object) -> None:
    with pytest.raises(InvalidModelError, match="no ONNX model"):
        OnnxModel.open(source)


@pytest.mark.parametrize(
    "batch",
    [
        Batch((torch.zeros(2, 63),)),
        Batch((torch.zeros(2, 64, dtype=torch.int64),)),
        Batch((torch.zeros(2, 64), torch.zeros(2))),
        Batch((), {"z": torch.zeros(2, 64)}),
        Batch((torch.zeros(2, 64),), {"x": torch.zeros(2, 64)}),
        Batch((torch.zeros(2, 64, 1),)),
        Batch(),
    ],
    ids=["size", "type", "count", "name", "twice", "rank", "none"],
)
def test_batch_that_does_not_fit_names_the_inputs(batch: Batch) -> None:
    model = OnnxModel.open(sound())
    for use in (model.run, model.record, model.observe):
        with pytest.raises(InvalidModelError, match=r"the model takes x: float32 \[N, 64\]"):
            use(batch)


@pytest.mark.parametrize("when", ["data", "model"])
def test_failure_while_saving_keeps_the_old_model(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(lambda *_: None)(tmp_path)
    model = OnnxModel.open(path)
    site = model.sites()[0]
    model.replace(
        "w", Layer(site, Form("svd", (20,)), FORMATS.get("svd").factorize(model.weight("w"), site, (20,)))
    )
    before = contents(tmp_path)

    def fail(*_args: object, **_options: object) -> None:
        raise OSError("no space left on device")

    if when == "data":
        monkeypatch.setattr(ir.LazyTensor, "tofile", fail)
        monkeypatch.setattr(ir.tensor_adapters.TorchTensor, "tofile", fail)
    else:
        monkeypatch.setattr(onnx, "save", fail)
        monkeypatch.setattr("onnx_ir._io.onnx.save", fail)
    with pytest.raises((OSError, TdpassError)):
        model.save(path, {})
    assert contents(tmp_path) == before
    OnnxModel.open(path)


def test_saving_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    model = OnnxModel.open(sound())
    with pytest.raises(UsageError, match="folder that exists"):
        model.save(tmp_path / "none" / "m.onnx", {})
    with pytest.raises(UsageError, match=r"name an \.onnx file"):
        model.save(tmp_path / "m.pt", {})
