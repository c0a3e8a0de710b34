"""onnxruntime: a graph of one layer in ONNX Runtime, its input and output bound to memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdpass.formats.layer import Layer
from tdpass.models.abilities import RunsAsGraph
from tdpass.models.base import Batch, Model
from tdpass.targets.layers import example_input
from tdpass.targets.runtimes.base import Bound, Call, Runtime, register_runtime

_SERVED = frozenset({torch.float32, torch.float64, torch.float16})


@register_runtime
class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    families = frozenset({"onnxruntime"})

    def version(self) -> str:
        import onnxruntime  # noqa: PLC0415 - takes a tenth of a second

        return str(onnxruntime.__version__)

    def prepare(self, layer: Layer, batch: int, threads: int) -> Callable[[], Tensor] | None:
        if layer.dtype not in _SERVED:
            return None
        # loads the ONNX libraries
        from tdpass.targets.sessions.onnx import as_graph, bound_layer  # noqa: PLC0415

        x = example_input(layer, batch)
        y = torch.empty(layer(x).shape, dtype=x.dtype)
        return bound_layer(as_graph(layer, x, y), x, y, threads)

    def prepare_model(self, model: Model, batch: Batch, threads: int) -> Call | None:
        if not isinstance(model, RunsAsGraph):
            return None
        from tdpass.targets.sessions.onnx import Saved, bound, open_session  # noqa: PLC0415 - as above

        saved = Saved(model)
        return Bound(bound(open_session(str(saved.path), threads), model.named_inputs(batch)), saved)
