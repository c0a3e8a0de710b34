"""Convolutions whose weight is levels as one operator, which expands a few outputs of it at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.formats.lowering import stage_of
from tdpass.kernels.conv_chain import MAX_TAPS
from tdpass.kernels.level_conv import LEVEL_CONV2D, pack_levels
from tdpass.layers.derived import Recipe, Tensors, derived
from tdpass.layers.image_call import ImageCall, ImageOperator
from tdpass.numbers import VALUES
from tdpass.numbers.levels import TABLE, Levels
from tdpass.ops import TorchOps
from tdpass.site import Site


@dataclass(frozen=True)
class PackLevels(Recipe[Tensors]):
    """Codes in panels of outputs, and the levels that they stand for."""

    site: Site
    form: Form
    names: tuple[str, ...]

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        held = dict(zip(self.names, tensors, strict=True))
        storage = Layer(self.site, self.form, held).storage
        ((name, numbers),) = storage.numbers.items()
        codes = numbers.unpacked(TorchOps(), held[storage.part_of(name, VALUES)], self.site.weights)
        return pack_levels(codes.reshape(self.site.shape), held[storage.part_of(name, TABLE)])


class LevelCall(ImageCall):
    """How the operator is called on what `PackLevels` packs."""

    def __call__(self, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, activation: str) -> Tensor:
        def call(image: Tensor) -> Tensor:
            y: Tensor = LEVEL_CONV2D.call(image, *packed, bias, None, self.stage.integers(), activation)
            return y

        return self.on_image(x, call)


class LevelConv(ImageOperator):
    """A convolution of levels as `level_conv2d`: no weight of floats is made of them in a call.

    Where gradients are wanted, while it is traced, compiled or exported, and for types that the kernels do
    not serve it runs as the layer that it is.
    """

    operator = "level_conv2d"
    calls = LevelCall

    @staticmethod
    def why_not(layer: Layer) -> str:
        stage = stage_of(layer.site) if layer.format == "dense" and layer.site.axes else None
        if stage is None or stage.groups > 1 or math.prod(stage.kernel) > MAX_TAPS:
            return (
                f"'{layer.form}' is no dense convolution of one group and at most {MAX_TAPS} taps in one or two "
                "dimensions"
            )
        if not all(isinstance(each, Levels) for each in layer.storage.numbers.values()):
            return f"'{layer.form}' holds no levels"
        return ""

    def packed(self) -> Tensors:
        """Codes and levels, as the operator takes them."""
        held = self.factors()
        return derived(PackLevels(self.site, self.form, tuple(held)), tuple(held.values()))

    def packed_call(self, x: Tensor) -> Tensor:
        return self.called(x, self.packed(), self.bias, self.activation)
