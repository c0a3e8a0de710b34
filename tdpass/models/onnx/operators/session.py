"""ONNX Runtime: whole models, and single nodes that have no torch function."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir import tensor_adapters
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tdpass.errors import InvalidModelError, KernelError, TdpassError, UnsupportedError
from tdpass.files import folder_beside, scratch_folder
from tdpass.kernels.native import onnx_ops_path
from tdpass.models.onnx.files.checks import brief
from tdpass.models.onnx.files.file import write
from tdpass.models.onnx.files.storage import stored_bytes
from tdpass.models.onnx.graph.deadline import loops, run_options
from tdpass.models.onnx.graph.graphs import all_nodes, within
from tdpass.models.onnx.graph.tensors import from_memory
from tdpass.models.onnx.operators.fused import DOMAIN, uses_fused_ops

_ERRORS_ONLY = 3
_THROUGH_A_FILE_ABOVE = 1 << 28


def register_fused_ops(options: onnxruntime.SessionOptions, source: str | bytes | ir.Model) -> bool:
    """Let a session run the model's fused operators where it uses them and their library is there.

    The model may be a file, or its content. Returns whether it does; without the library ONNX Runtime runs
    what the model says that they compute.
    """
    if not has_fused_ops(source):
        return False
    try:
        options.register_custom_ops_library(str(onnx_ops_path()))
    except KernelError:
        return False
    return True


def has_fused_ops(source: str | bytes | ir.Model) -> bool:
    """Whether a model (or file, or its content) is faster in a session with the library of fused operators.

    Not where it cannot be read.
    """
    if isinstance(source, ir.Model):
        return uses_fused_ops(source)
    try:
        proto = (
            onnx.load(source, load_external_data=False)
            if isinstance(source, str)
            else onnx.load_from_string(source)
        )
    except Exception:  # noqa: BLE001 - the session that is opened next says what is wrong with it
        return False
    return any(function.domain == DOMAIN for function in proto.functions)


def _session(
    source: str | bytes, model: ir.Model | None = None, threads: int = 0, trace: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = _ERRORS_ONLY, threads
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # what waits leaves its core to others
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(
            "session.disable_prepacking", "1"
        )  # a packed weight is no longer among a node's inputs
    elif model is not None:
        register_fused_ops(options, model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class Session:
    """A model in ONNX Runtime on the CPU, with that many threads (0: one per core).

    Raises `InvalidModelError` for one that it refuses. With `trace`, the beginning of a file's name, nodes
    run as the model has them and `end_trace` says what ran.
    """

    def __init__(self, model: ir.Model, threads: int = 0, trace: Path | None = None) -> None:
        try:
            if stored_bytes(model) > _THROUGH_A_FILE_ABOVE:
                # ONNX Runtime maps the weights from the file, so it has to live as long as the session.
                path = scratch_folder() / "model.onnx"
                weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)
                write(model, path, external=True)
                self._session = _session(str(path), model, threads, trace)
            else:
                self._session = _session(ir.to_proto(model).SerializeToString(), model, threads, trace)
        except InvalidModelError:
            raise
        except Exception as error:
            raise InvalidModelError(f"ONNX Runtime refuses the model: {brief(error)}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._loops = loops(all_nodes(model))

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        try:
            with run_options(self._loops) as options:
                results = self._session.run(
                    self._outputs, {name: _to_numpy(tensor) for name, tensor in inputs.items()}, options
                )
        except TdpassError:
            raise
        except Exception as error:
            raise InvalidModelError(f"ONNX Runtime fails on the model: {brief(error)}") from error
        return {name: from_memory(result) for name, result in zip(self._outputs, results, strict=True)}

    def end_trace(self) -> list[Mapping[str, Any]]:
        """Every node that ran, as often as it did.

        Its name, type, and the types and sizes of inputs that are present and of outputs.
        """
        text = Path(self._session.end_profiling()).read_text(encoding="utf-8")
        try:
            events = json.loads(text)
        except json.JSONDecodeError:  # ONNX Runtime does not say that it could not write all of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        return [
            event for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {})
        ]

    def bound(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """A call that runs the model on these inputs, already in place, and drops its outputs.

        What is timed.
        """
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(
                name, onnxruntime.OrtValue.ortvalue_from_numpy(_to_numpy(tensor.contiguous()))
            )
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        return lambda: self._session.run_with_iobinding(binding)


def traced(model: ir.Model, inputs: Mapping[str, Tensor]) -> list[Mapping[str, Any]]:
    """What ONNX Runtime executes when it runs the model once; see `Session.end_trace`."""
    with folder_beside(Path(tempfile.gettempdir()) / "trace") as folder:
        session = Session(model, trace=folder / "trace")
        session(inputs)
        return session.end_trace()


def _to_numpy(tensor: Tensor) -> object:
    if tensor.dtype is torch.bfloat16:
        raise UnsupportedError(
            "ONNX Runtime takes no bfloat16 inputs from Python; cast the model's inputs to float32"
        )
    return tensor.detach().cpu().numpy()


class NodeSession:
    """One node, with the subgraphs it may have, run by ONNX Runtime; its outputs carry no gradient.

    Called with the node's inputs, None for absent ones, and then the outer values that its subgraphs read.  A
    recording torch function mode sees one call.
    """

    def __init__(self, node: ir.Node, model: ir.Model, captured: Sequence[ir.Value]) -> None:
        self.__name__ = f"onnx_{node.op_type}"
        self._node = ir.serde.serialize_node(node)
        self._loops = loops([node, *within(node)])
        self._refused: TdpassError | None = None
        self._captured = [value.name or "" for value in captured]
        self._opsets = [
            onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()
        ]
        self._ir_version = model.ir_version or 10
        self._sessions: dict[tuple[torch.dtype, ...], onnxruntime.InferenceSession] = {}

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        present = tuple(tensor for tensor in inputs if tensor is not None)
        if has_torch_function(present):
            return tuple(handle_torch_function(self, present, *inputs))
        names = [*self._node.input, *self._captured]
        feeds = {name: tensor for name, tensor in zip(names, inputs, strict=True) if tensor is not None}
        session = self._session_for(feeds)
        if self._refused is not None:
            raise self._refused
        try:
            with run_options(self._loops) as options:
                results = session.run(
                    None, {name: _to_numpy(tensor) for name, tensor in feeds.items()}, options
                )
        except TdpassError as error:
            self._refused = error
            raise
        except Exception as error:
            raise InvalidModelError(
                f"node {self._node.name!r} ({self._node.op_type}) fails in ONNX Runtime: {brief(error)}"
            ) from error
        return tuple(from_memory(result) for result in results)

    def _session_for(self, feeds: Mapping[str, Tensor]) -> onnxruntime.InferenceSession:
        key = tuple(tensor.dtype for tensor in feeds.values())
        if key not in self._sessions:
            inputs = [
                onnx.helper.make_tensor_value_info(name, _element_type(tensor), None)
                for name, tensor in feeds.items()
            ]
            outputs = [onnx.ValueInfoProto(name=name) for name in self._node.output if name]
            graph = onnx.helper.make_graph([self._node], "node", inputs, outputs)
            model = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
            try:
                self._sessions[key] = _session(model.SerializeToString())
            except Exception as error:
                raise UnsupportedError(
                    f"operator {self._node.op_type} (node {self._node.name!r}) is known neither to tdpass "
                    f"nor to ONNX Runtime on the CPU: {brief(error)}"
                ) from error
        return self._sessions[key]


def _element_type(tensor: Tensor) -> int:
    return int(tensor_adapters.from_torch_dtype(tensor.dtype))
