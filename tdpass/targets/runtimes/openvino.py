"""openvino: the same graphs in OpenVINO, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdpass.formats.layer import Layer
from tdpass.models.abilities import RunsAsGraph
from tdpass.models.base import Batch, Model
from tdpass.targets.layers import example_input
from tdpass.targets.runtimes.base import Bound, BoundLayer, Call, Runtime, register_runtime


@register_runtime
class OpenVino(Runtime):
    """OpenVINO on the CPU, in the precision of the model."""

    name = "openvino"
    families = frozenset({"openvino"})
    precision: ClassVar[str] = "f32"

    def available(self) -> bool:
        return importlib.util.find_spec("openvino") is not None

    def version(self) -> str:
        return str(importlib.import_module("openvino").__version__)

    def prepare(self, layer: Layer, batch: int, threads: int) -> Callable[[], Tensor] | None:
        if layer.dtype is not torch.float32:
            return None
        from tdpass.models.onnx.fused.layer_graph import INPUT  # noqa: PLC0415 - loads the ONNX libraries
        from tdpass.targets.sessions.onnx import as_graph  # noqa: PLC0415 - as above

        x = example_input(layer, batch)
        try:
            request = self._request(open_graph(as_graph(layer, x, layer(x))), {INPUT: x}, threads)
            request.infer()
        # it raises several unrelated types, and each means that it does not serve this layer
        except Exception:  # noqa: BLE001
            return None
        return BoundLayer(request.infer, x, torch.from_numpy(request.get_output_tensor(0).data))

    def prepare_model(self, model: Model, batch: Batch, threads: int) -> Call | None:
        if not isinstance(model, RunsAsGraph):
            return None
        from tdpass.targets.sessions.onnx import Saved  # noqa: PLC0415 - as above

        saved, inputs = Saved(model), model.named_inputs(batch)
        return Bound(self._request(open_graph(str(saved.path)), inputs, threads).infer, (saved, inputs))

    def _request(self, graph: Any, inputs: Mapping[str, Tensor], threads: int) -> Any:
        return open_request(graph, inputs, threads, self.precision)


@register_runtime
class OpenVinoByDefault(OpenVino):
    """OpenVINO on the CPU in its own choice of precision: bfloat16 where the processor multiplies that."""

    name = "openvino_default"
    families = frozenset({"openvino_default"})
    precision = ""
    rounding = 2e-2

    def version(self) -> str:
        return f"{super().version()} {default_precision()}"


def default_precision() -> str:
    """The precision in which OpenVINO computes here where none is asked for, such as `bfloat16`."""
    core = importlib.import_module("openvino").Core()
    return str(core.get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name())


def open_graph(source: str | bytes) -> Any:
    """A model as OpenVINO reads it, from a path or a serialized ONNX model."""
    return importlib.import_module("openvino").Core().read_model(source)


def open_request(graph: Any, inputs: Mapping[str, Tensor], threads: int, precision: str = "f32") -> Any:
    """One inference request with its inputs set; without a precision OpenVINO computes in that it chooses."""
    openvino = importlib.import_module("openvino")
    hints = {
        **({"INFERENCE_PRECISION_HINT": precision} if precision else {}),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT_NUM_REQUESTS": 1,
    }
    graph.reshape({name: list(tensor.shape) for name, tensor in inputs.items()})
    request = openvino.Core().compile_model(graph, "CPU", hints).create_infer_request()
    for name, tensor in inputs.items():
        request.set_tensor(name, openvino.Tensor(tensor.contiguous().numpy(), shared_memory=True))
    return request
