"""kernels: the fused operators of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tdpass.form import DENSE
from tdpass.formats.contraction import contraction_of
from tdpass.formats.layer import Layer
from tdpass.formats.lowering import Lowered, lower
from tdpass.kernels import native
from tdpass.kernels.conv_chain import CONV_CHAIN, packing
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.stage import Lanes
from tdpass.kernels.tensor_chain import TENSOR_CHAIN
from tdpass.targets.layers import channels_last, example_input
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
        if lowered is not None:
            return _bind(layer, lowered, x, self.lanes) if lowered.axes or self.lanes == "channels" else None
        return _bind_contraction(layer, x) if self.lanes == "channels" else None


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


def _bind(layer: Layer, lowered: Lowered, x: Tensor, lanes: Lanes) -> Callable[[], Tensor]:
    packed_for = packing(lanes, x.dtype)
    packed = lowered.pack(layer, packed_for)
    if not lowered.axes:
        return lambda: _call(LINEAR_CHAIN.call, x, packed, layer.bias, None, lowered.widths, "identity")
    seen = x if x.dim() == 4 else x[:, :, None]
    placed = channels_last(seen) if lanes == "channels" else seen.contiguous()
    integers = lowered.integers

    def run() -> Tensor:
        y = _call(CONV_CHAIN.call, placed, packed, layer.bias, None, integers, "identity", packed_for)
        return y if x.dim() == 4 else y[:, :, 0]

    return run


def _bind_contraction(layer: Layer, x: Tensor) -> Callable[[], Tensor] | None:
    contraction = contraction_of(layer)
    if contraction is None:
        return None
    steps, packed = contraction
    integers = [value for step in steps for value in step.integers()]
    return lambda: _call(TENSOR_CHAIN.call, x, packed, layer.bias, None, integers, "identity")


def _call(operator: Any, *arguments: Tensor | Sequence[Tensor] | Sequence[int] | str | None) -> Tensor:
    y: Tensor = operator(*arguments)
    return y
