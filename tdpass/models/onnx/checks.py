"""Checks of models that come in or go out: every way to be unsound ends in one error that says what, where and what to do."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir

from tdpass.errors import InvalidModelError, TdpassError, UnsupportedError
from tdpass.models.onnx.shapes import fill_output_shapes, skeleton
from tdpass.models.onnx.storage import model_from, open_data_files

EXTERNAL_ABOVE = 3 << 29
_OPSETS = range(7, 27)  # 7 brought today's broadcasting; ONNX Runtime 1.31 ends at 26
_IR_VERSIONS = range(3, 14)
_TOLERATED = (
    "Field 'shape' of 'type' is required but missing", "No Op registered for",
    "must be topologically sorted", "not compatible with the version imported by model",
)  # fmt: skip
_RUNTIME_OPERATORS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def brief(error: BaseException) -> str:
    """An error's message on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return (text[:237] + "..." if len(text) > 240 else text) or type(error).__name__


@contextlib.contextmanager
def invalid_if_failing(what: str, hint: str) -> Iterator[None]:
    """Whatever fails inside means that the model is invalid: the libraries raise a dozen unrelated types."""
    try:
        yield
    except TdpassError:
        raise
    except Exception as error:
        raise InvalidModelError(f"{what}: {brief(error)}; {hint}") from error


def check_proto(proto: onnx.ModelProto, path: Path | None = None) -> None:
    """Raise `InvalidModelError` unless the model is sound; `path` is where its external data lies, None where it may have none."""
    what = repr(str(path)) if path is not None else "the model"
    _check_versions(proto, what)
    with invalid_if_failing(f"{what} is not a valid ONNX model", "export it again"):
        for tensor in tensor_protos(proto):
            _check_tensor(tensor, path, what)
        for node in node_protos(proto):
            _check_node(node, what)
        if path is None and _content_bytes(proto) > EXTERNAL_ABOVE:
            check_structure(model_from(proto, None), "export it again")
            return
        try:
            onnx.checker.check_model(proto if path is None else str(path), full_check=True)
        except onnx.checker.ValidationError as error:
            if not any(reason in str(error) for reason in _TOLERATED):
                raise
            model = model_from(proto, None if path is None else path.parent)
            open_data_files(model)
            check_structure(model, "export it again")


def check_structure(model: ir.Model, hint: str) -> None:
    """Check everything but the contents of large weights, in little memory; raises `InvalidModelError`."""
    with invalid_if_failing("the model is inconsistent", hint):
        proto = skeleton(model)
        _accept_runtime_operators(proto)
        fill_output_shapes(proto)
        onnx.checker.check_model(proto, full_check=True)


def _accept_runtime_operators(proto: onnx.ModelProto) -> None:
    """Take operators that ONNX Runtime's optimizer puts in the standard domain, at any opset, for what they are: its own."""
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    own = [node for graph in graph_protos(proto) for node in graph.node if not node.domain and node.op_type in _RUNTIME_OPERATORS]
    for node in own:
        if not onnx.defs.has(node.op_type, opset, ""):
            node.domain = "com.microsoft"
            if all(entry.domain != node.domain for entry in proto.opset_import):
                proto.opset_import.append(onnx.helper.make_opsetid(node.domain, 1))


def _check_versions(proto: onnx.ModelProto, what: str) -> None:
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    opset = opsets.get("ai.onnx")
    if not proto.HasField("graph") or not proto.graph.node:
        raise InvalidModelError(f"{what} holds no graph; export the model again")
    if opset is None:
        raise InvalidModelError(f"{what} does not say which version of the standard operators it uses; export the model again")
    if opset not in _OPSETS:
        raise InvalidModelError(f"{what} uses opset {opset}; supported is {_OPSETS[0]} to {_OPSETS[-1]}; convert it with onnx.version_converter")
    if proto.ir_version not in _IR_VERSIONS:
        raise InvalidModelError(f"{what} is of IR version {proto.ir_version}; supported is {_IR_VERSIONS[0]} to {_IR_VERSIONS[-1]}; export it again")
    if proto.training_info:
        raise UnsupportedError(f"{what} holds training information; export it for inference")
    if any(graph.sparse_initializer for graph in graph_protos(proto)):
        raise UnsupportedError(f"{what} holds sparse initializers; store them as dense ones")


def graph_protos(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph, those in local functions included."""
    waiting = [proto.graph, *(graph for function in proto.functions for graph in _subgraphs(function.node))]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting.extend(_subgraphs(graph.node))


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.graphs
            if attribute.HasField("g"):
                yield attribute.g


def node_protos(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of local functions included."""
    for graph in graph_protos(proto):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def tensor_protos(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every initializer and every tensor that a node holds."""
    for graph in graph_protos(proto):
        yield from graph.initializer
    for node in node_protos(proto):
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _content_bytes(proto: onnx.ModelProto) -> int:
    return sum(len(tensor.raw_data) for graph in graph_protos(proto) for tensor in graph.initializer)


def _check_node(node: onnx.NodeProto, what: str) -> None:
    for attribute in node.attribute:
        smallest = {"group": 1, "strides": 1, "dilations": 1, "kernel_shape": 1}.get(attribute.name)
        given = [*attribute.ints, *([attribute.i] if attribute.HasField("i") else [])]
        if smallest is not None and not node.domain and any(number < smallest for number in given):
            raise InvalidModelError(f"{what}: node {node.name!r} ({node.op_type}) has {attribute.name}={given}, but 1 is the least; export the model again")


def _check_tensor(tensor: onnx.TensorProto, path: Path | None, what: str) -> None:
    shape = list(tensor.dims)
    if any(size < 0 for size in shape):
        raise InvalidModelError(f"{what}: tensor {tensor.name!r} has negative sizes {shape}; export the model again")
    if tensor.data_type == onnx.TensorProto.STRING:
        return
    expected = math.ceil(math.prod(shape) * ir.DataType(tensor.data_type).bitwidth / 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, expected, path, what)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
        held = len(tensor.raw_data)
        raise InvalidModelError(f"{what}: tensor {tensor.name!r} of sizes {shape} holds {held} bytes instead of {expected}; export the model again")
    elif not tensor.HasField("raw_data") and expected and not any(len(getattr(tensor, field)) for field in _TYPED_FIELDS):
        raise InvalidModelError(f"{what}: tensor {tensor.name!r} of sizes {shape} holds no data; export the model again")


def _check_external(tensor: onnx.TensorProto, expected: int, path: Path | None, what: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if path is None:
        raise InvalidModelError(f"tensor {tensor.name!r} is in an external file; give the model's path, or load it with its external data")
    if not location or Path(location).is_absolute() or location.startswith(("/", "\\")) or ".." in PurePosixPath(location.replace("\\", "/")).parts:
        raise InvalidModelError(f"{what}: tensor {tensor.name!r} points to {location!r}, outside of the model's folder; move the data beside the model")
    file = path.parent / location
    folder = os.path.realpath(path.parent)
    if os.path.commonpath([os.path.realpath(file), folder]) != folder:
        raise InvalidModelError(f"{what}: the data file {location!r} is a link to outside of the model's folder; copy the data beside the model")
    try:
        status = file.stat()
    except OSError as error:
        raise InvalidModelError(f"{what}: the data file {location!r} cannot be found ({brief(error)}); put it beside the model") from error
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModelError(f"{what}: the data file {location!r} is not a regular file; put the data itself beside the model")
    if status.st_nlink > 1:
        raise InvalidModelError(f"{what}: the data file {location!r} has several hard links, which may expose another file; copy it")
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    if offset < 0 or length != expected or offset + length > status.st_size:
        raise InvalidModelError(
            f"{what}: tensor {tensor.name!r} needs {expected} bytes, but is said to be {length} bytes at {offset} of a file of {status.st_size}; "
            "the data file is cut short or belongs to another model"
        )
