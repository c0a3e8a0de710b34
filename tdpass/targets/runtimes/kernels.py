"""kernels: the fused operators of this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from torch import Tensor

from tdpass.form import DENSE
from tdpass.formats.layer import Layer
from tdpass.formats.lowering import lower
from tdpass.kernels import native
from tdpass.kernels.stage import Lanes
from tdpass.layers.contracted import Contracted
from tdpass.layers.fused import Fused
from tdpass.targets.layers import channels_last, example_input, factored_module
from tdpass.targets.runtimes.base import Runtime, register_runtime


class Kernels(Runtime):
    """One operator for a whole factor chain."""

    families = frozenset({"torch"})
    lanes: ClassVar[Lanes]

    def version(self) -> str:
        return f"{native.isa()} {native.version()}"

    def available(self) -> bool:
        return native.library() is not None

    def prepare(self, layer: Layer, batch: int, threads: int) -> Callable[[], Tensor] | None:
        if layer.form == DENSE:
            return None
        x, lowered = example_input(layer, batch), lower(layer)
        if lowered is None:
            cores = self.lanes == "channels" and not Contracted.why_not(layer)
            return partial(Contracted.of(factored_module(layer)), x) if cores else None
        if not lowered.axes and self.lanes != "channels":
            return None
        return partial(Fused.of(factored_module(layer), lanes=self.lanes), self.placed(x))

    def placed(self, x: Tensor) -> Tensor:
        """The input as these lanes read it best."""
        return channels_last(x)


@register_runtime
class ChannelLanes(Kernels):
    """Output channels in vector lanes, images channels innermost; linear layers too."""

    name = "kernels-channels"
    lanes = "channels"


@register_runtime
class PixelLanes(Kernels):
    """Output pixels in vector lanes: convolutions of few channels."""

    name = "kernels-pixels"
    lanes = "pixels"

    def placed(self, x: Tensor) -> Tensor:
        return x.contiguous()
