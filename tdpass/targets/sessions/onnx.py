"""Sessions of ONNX Runtime for layers and models, their inputs and outputs bound to memory."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import onnxruntime
from torch import Tensor

from tdpass.files import scratch_folder
from tdpass.formats.layer import Layer
from tdpass.models.base import Model
from tdpass.models.onnx.fused.layer_graph import INPUT, OUTPUT, layer_graph
from tdpass.models.onnx.operators.session import register_fused_ops
from tdpass.targets.layers import apply_layer, weights_of
from tdpass.targets.runtimes.base import BoundLayer, Call

_ERRORS_ONLY = 3


class Saved:
    """A model in a file of its own, for as long as this object lives.

    Runtimes map large weights from there.
    """

    def __init__(self, model: Model) -> None:
        self.path = scratch_folder() / "model.onnx"
        weakref.finalize(self, shutil.rmtree, self.path.parent, ignore_errors=True)
        model.save(self.path, {})


def as_graph(layer: Layer, x: Tensor, y: Tensor) -> bytes:
    """The layer as a serialized ONNX model."""
    return layer_graph(
        weights_of(layer), x, y, lambda ops, value, weights: apply_layer(ops, layer, value, weights)
    )


def bound_layer(graph: bytes, x: Tensor, y: Tensor, threads: int) -> Callable[[], Tensor] | None:
    """A call that runs a graph of one layer from x to y; None where ONNX Runtime does not take it."""
    try:
        session = open_session(graph, threads)
        binding = session.io_binding()
        for name, tensor, bind in ((INPUT, x, binding.bind_input), (OUTPUT, y, binding.bind_output)):
            bind(name, "cpu", 0, tensor.numpy().dtype.type, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
    # it raises a dozen unrelated types, and each means that it does not serve this layer
    except Exception:  # noqa: BLE001
        return None
    return BoundLayer(lambda: session.run_with_iobinding(binding), x, y)


def open_session(source: str | bytes, threads: int) -> Any:
    """A session on the CPU with that many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = (
        threads,
        1,
        _ERRORS_ONLY,
    )
    register_fused_ops(options, source)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def bound(session: Any, inputs: Mapping[str, Tensor]) -> Call:
    """A call that runs a session on these inputs, all memory bound beforehand."""
    binding = session.io_binding()
    for name, tensor in inputs.items():
        binding.bind_ortvalue_input(
            name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
        )
    for value in session.get_outputs():
        binding.bind_output(value.name, "cpu")
    return lambda: session.run_with_iobinding(binding)
