"""How an operator on images is called for a layer on images, signals or rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.formats.layer import Layer
from tdpass.formats.lowering import stage_of
from tdpass.kernels.stage import Stage
from tdpass.layers.one_operator import OneOperator
from tdpass.layers.tracing import is_traced


@dataclass(frozen=True)
class ImageCall(ABC):
    """The geometry of a layer, and how its input is padded before the operator sees it."""

    stage: Stage
    axes: int
    padding_mode: str
    pads: tuple[int, ...]

    @abstractmethod
    def __call__(self, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, activation: str) -> Tensor:
        """The operator on the input and a packed weight."""

    def padded(self, x: Tensor) -> Tensor:
        """The input with padding that is no zeros."""
        return F.pad(x, self.pads, mode=self.padding_mode) if self.pads else x

    def on_image(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """`call` on the padded input, a signal being an image of height one."""
        x = self.padded(x)
        return call(x.unsqueeze(2)).squeeze(2) if self.axes == 1 else call(x)


class ImageOperator(OneOperator):
    """A layer as one operator that is called by `calls`, outside of traces alone."""

    calls: ClassVar[type[ImageCall]]

    def __init__(
        self, layer: Layer, bias: nn.Parameter | None, padding_mode: str = "zeros", pads: tuple[int, ...] = ()
    ) -> None:
        super().__init__(layer, bias, padding_mode, pads)
        stage = stage_of(layer.site)
        assert stage is not None
        self.called = self.calls(stage, layer.site.axes, padding_mode, pads)

    def serves(self, x: Tensor) -> bool:
        return self.fits(x, [self.bias]) and not is_traced(x)
