"""How an operator on images is called for a layer on images, signals or rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tdpass.kernels.stage import Stage


@dataclass(frozen=True)
class ImageCall:
    """The geometry of a layer, and how its input is padded before the operator sees it."""

    stage: Stage
    axes: int
    padding_mode: str
    pads: tuple[int, ...]

    def padded(self, x: Tensor) -> Tensor:
        """The input with padding that is no zeros."""
        return F.pad(x, self.pads, mode=self.padding_mode) if self.pads else x

    def on_image(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """`call` on the padded input, a signal being an image of height one."""
        x = self.padded(x)
        return call(x.unsqueeze(2)).squeeze(2) if self.axes == 1 else call(x)
