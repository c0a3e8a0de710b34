"""kernels in onnxruntime: the fused operators of this package, as operators of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.formats.layer import Layer
from tdpass.kernels import native
from tdpass.kernels.stage import Lanes
from tdpass.targets.layers import example_input
from tdpass.targets.runtimes.base import Runtime, register_runtime


class KernelsInOnnxRuntime(Runtime):
    """One operator for a whole factor chain."""

    families = frozenset({"onnxruntime"})
    lanes: ClassVar[Lanes]

    def version(self) -> str:
        import onnxruntime  # noqa: PLC0415 - takes a tenth of a second

        return f"{onnxruntime.__version__} {native.version()}"

    def available(self) -> bool:
        try:
            return native.onnx_ops_path().exists()
        except KernelError:
            return False

    def prepare(self, layer: Layer, batch: int, threads: int) -> Callable[[], Tensor] | None:
        if not isinstance(layer, Layer) or layer.dtype is not torch.float32:
            return None
        # loads the ONNX libraries
        from tdpass.models.onnx.fused.fuse_layer_graph import fuse_layer_graph  # noqa: PLC0415
        from tdpass.targets.sessions.onnx import as_graph, bound_layer  # noqa: PLC0415 - as above

        x = example_input(layer, batch)
        y = layer(x)
        graph = fuse_layer_graph(as_graph(layer, x, y), self.lanes)
        return (
            None
            if graph is None
            else bound_layer(graph, x, torch.empty_like(y, memory_format=torch.contiguous_format), threads)
        )


@register_runtime
class ChannelLanesInOnnxRuntime(KernelsInOnnxRuntime):
    """Output channels in vector lanes."""

    name = "onnxruntime-kernels-channels"
    lanes = "channels"


@register_runtime
class PixelLanesInOnnxRuntime(KernelsInOnnxRuntime):
    """Output pixels in vector lanes: convolutions of few channels."""

    name = "onnxruntime-kernels-pixels"
    lanes = "pixels"
