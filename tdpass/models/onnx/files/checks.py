"""Checks of models that come in or go out.

Every way to be unsound ends in one error that says what, where and what to do.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir

from tdpass.errors import InvalidModelError, TdpassError, UnsupportedError
from tdpass.models.onnx.files.bounds import check_expansion, check_loops, physical_memory
from tdpass.models.onnx.files.layer_checks import check_layers
from tdpass.models.onnx.files.storage import model_from, open_data_files
from tdpass.models.onnx.graph.protos import graph_protos, node_protos, tensor_protos, texts
from tdpass.models.onnx.graph.shapes import fill_shapes, skeleton

EXTERNAL_ABOVE = 3 << 29
_OPSETS = range(7, 27)  # 7 brought today's broadcasting; ONNX Runtime 1.31 ends at 26
_IR_VERSIONS = range(3, 14)
_TOLERATED = (
    "Field 'shape' of 'type' is required but missing", "No Op registered for",
    "must be topologically sorted", "not compatible with the version imported by model",
)  # fmt: skip
_RUNTIME_OPERATORS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})
_ENTRIES_PER_NUMBER: dict[int, int] = {onnx.TensorProto.COMPLEX64: 2, onnx.TensorProto.COMPLEX128: 2}
_LONGEST_NUMBER = 19  # digits of the largest size that a file system knows
_AUTO_PADS = frozenset({b"", b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID"})


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
    """Raise `InvalidModelError` unless the model is sound.

    `path` is where its external data lies, None where it may have none.
    """
    what = repr(str(path)) if path is not None else "the model"
    _check_versions(proto, what)
    with invalid_if_failing(f"{what} is not a valid ONNX model", "export it again"):
        wrong = next((text for text in texts(proto) if not isinstance(text, str)), None)
        if wrong is not None:
            raise InvalidModelError(
                f"{what} has a name or description that is no UTF-8 text: {repr(wrong)[:80]}; export the "
                "model again"
            )
        for tensor in tensor_protos(proto):
            _check_tensor(tensor, path, what)
        check_expansion(proto, what)
        for graph in graph_protos(proto):
            _check_names(graph, what)
        for node in node_protos(proto):
            _check_node(node, what)
        check_loops(proto, what)
        if path is None and _content_bytes(proto) > EXTERNAL_ABOVE:
            check_structure(model_from(proto, None), "export it again")
            return
        try:
            onnx.checker.check_model(proto if path is None else str(path), full_check=True)
        except onnx.shape_inference.InferenceError:
            check_layers(model_from(proto, None if path is None else path.parent))  # it says more
            raise
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
        fill_shapes(proto)
        onnx.checker.check_model(proto, full_check=True)


def _accept_runtime_operators(proto: onnx.ModelProto) -> None:
    """Take operators that ONNX Runtime's optimizer puts in the standard domain for its own.

    It puts them there at any opset.
    """
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    own = [
        node
        for graph in graph_protos(proto)
        for node in graph.node
        if not node.domain and node.op_type in _RUNTIME_OPERATORS
    ]
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
        raise InvalidModelError(
            f"{what} does not say which version of the standard operators it uses; export the model again"
        )
    if opset not in _OPSETS:
        raise InvalidModelError(
            f"{what} uses opset {opset}; supported is {_OPSETS[0]} to {_OPSETS[-1]}; convert it with "
            "onnx.version_converter"
        )
    if proto.ir_version not in _IR_VERSIONS:
        raise InvalidModelError(
            f"{what} is of IR version {proto.ir_version}; supported is {_IR_VERSIONS[0]} to "
            f"{_IR_VERSIONS[-1]}; export it again"
        )
    if proto.training_info:
        raise UnsupportedError(f"{what} holds training information; export it for inference")
    if any(graph.sparse_initializer for graph in graph_protos(proto)):
        raise UnsupportedError(f"{what} holds sparse initializers; store them as dense ones")
    if any(
        attribute.HasField("sparse_tensor") for node in node_protos(proto) for attribute in node.attribute
    ):
        raise UnsupportedError(f"{what} holds sparse constants; store them as dense ones")


def _content_bytes(proto: onnx.ModelProto) -> int:
    return sum(len(tensor.raw_data) for graph in graph_protos(proto) for tensor in graph.initializer)


def _check_node(node: onnx.NodeProto, what: str) -> None:
    for attribute in node.attribute:
        smallest = {"group": 1, "strides": 1, "dilations": 1, "kernel_shape": 1}.get(attribute.name)
        given = [*attribute.ints, *([attribute.i] if attribute.HasField("i") else [])]
        if smallest is not None and not node.domain and any(number < smallest for number in given):
            raise InvalidModelError(
                f"{what}: node {node.name!r} ({node.op_type}) has {attribute.name}={given}, but 1 is the "
                "least; export the model again"
            )
        if attribute.name == "auto_pad" and not node.domain and attribute.s not in _AUTO_PADS:
            given_text = attribute.s.decode("utf-8", "replace")
            raise InvalidModelError(
                f"{what}: node {node.name!r} ({node.op_type}) has auto_pad={given_text!r}; "
                "ONNX knows NOTSET, SAME_UPPER, SAME_LOWER and VALID: export the model again"
            )


def _check_names(graph: onnx.GraphProto, what: str) -> None:
    """Refuse names that stand for two values in a graph; runtimes refuse them too, or take one of the two.

    A node's name is read by people only, and files in daily use have one for several.
    """
    named = {
        "input": [value.name for value in graph.input],
        "output": [value.name for value in graph.output],
        "initializer": [tensor.name for tensor in graph.initializer],
    }
    for kind, names in named.items():
        if len(set(names)) < len(names):
            twice = next(name for name, times in Counter(names).items() if times > 1)
            raise InvalidModelError(
                f"{what} has two {kind}s of the name {twice!r} in one graph; give each its own, or export "
                "the model again"
            )


def _check_tensor(tensor: onnx.TensorProto, path: Path | None, what: str) -> None:
    shape = list(tensor.dims)
    if any(size < 0 for size in shape):
        raise InvalidModelError(
            f"{what}: tensor {tensor.name!r} has negative sizes {shape}; export the model again"
        )
    if tensor.data_type == onnx.TensorProto.STRING:
        return
    bits = ir.DataType(tensor.data_type).bitwidth
    expected = math.ceil(math.prod(shape) * bits / 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, expected, path, what)
    elif tensor.HasField("raw_data"):
        _check_held(tensor, len(tensor.raw_data), expected, "bytes", what)
    else:
        entries = math.ceil(math.prod(shape) * min(bits, 8) / 8) * _ENTRIES_PER_NUMBER.get(
            tensor.data_type, 1
        )
        _check_held(
            tensor,
            len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))),
            entries,
            "entries",
            what,
        )


def _check_held(tensor: onnx.TensorProto, held: int, expected: int, unit: str, what: str) -> None:
    if held != expected:
        content = f"holds {held} {unit} instead of {expected}" if held else "holds no data"
        raise InvalidModelError(
            f"{what}: tensor {tensor.name!r} of sizes {list(tensor.dims)} {content}; export the model again"
        )


def _check_external(tensor: onnx.TensorProto, expected: int, path: Path | None, what: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if path is None:
        raise InvalidModelError(
            f"tensor {tensor.name!r} is in an external file; give the model's path, or load it with its "
            "external data"
        )
    if (
        not location
        or Path(location).is_absolute()
        or location.startswith(("/", "\\"))
        or ".." in PurePosixPath(location.replace("\\", "/")).parts
    ):
        raise InvalidModelError(
            f"{what}: tensor {tensor.name!r} points to {location!r}, outside of the model's folder; move "
            "the data beside the model"
        )
    file = path.parent / location
    folder = os.path.realpath(path.parent)
    if os.path.commonpath([os.path.realpath(file), folder]) != folder:
        raise InvalidModelError(
            f"{what}: the data file {location!r} is a link to outside of the model's folder; copy the data "
            "beside the model"
        )
    try:
        status = file.stat()
    except OSError as error:
        raise InvalidModelError(
            f"{what}: the data file {location!r} cannot be found ({brief(error)}); put it beside the model"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModelError(
            f"{what}: the data file {location!r} is not a regular file; put the data itself beside the model"
        )
    if status.st_nlink > 1:
        raise InvalidModelError(
            f"{what}: the data file {location!r} has several hard links, which may expose another file; "
            "copy it"
        )
    offset, length = (
        _place(tensor, key, entries.get(key, str(default)), what)
        for key, default in (("offset", 0), ("length", expected))
    )
    if length != expected or offset + length > status.st_size:
        raise InvalidModelError(
            f"{what}: tensor {tensor.name!r} needs {expected} bytes, but is said to be {length} bytes at "
            f"{offset} of a file of {status.st_size}; "
            "the data file is cut short or belongs to another model"
        )
    memory = physical_memory()
    if memory is not None and expected > memory:
        raise InvalidModelError(
            f"{what}: tensor {tensor.name!r} of sizes {list(tensor.dims)} takes {expected:,} bytes, and "
            f"this machine has {memory:,}; "
            "check the sizes, or use a larger machine"
        )


def _place(tensor: onnx.TensorProto, key: str, text: str, what: str) -> int:
    """A place in a file, or a length, as an external tensor names it."""
    if not text.isascii() or not text.isdigit() or len(text) > _LONGEST_NUMBER:
        raise InvalidModelError(
            f"{what}: tensor {tensor.name!r} has {key}={text[:_LONGEST_NUMBER]!r}, which is no place in a "
            "file; export the model again"
        )
    return int(text)
