"""Linear layers side by side, in the place of one whose weight they are slices of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tdpass.layers.opening import linear


class Parallel(nn.Module):
    """Layers `0`, `1`, ... that read the same: `y = [W_0 x + b_0, W_1 x + b_1, ...]` along the last axis.

    `sizes` are their numbers of outputs. Any of them may be replaced by a factored layer.
    """

    def __init__(self, layers: Sequence[nn.Module], sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], *, trained: bool) -> Self:
        """The slices of a weight `[o, i]` and its bias, sharing their memory."""
        weights = torch.split(weight.detach(), list(sizes))
        biases = [None] * len(sizes) if bias is None else torch.split(bias.detach(), list(sizes))
        layers = [
            linear(nn.Parameter(part, trained), None if shift is None else nn.Parameter(shift, trained))
            for part, shift in zip(weights, biases, strict=True)
        ]
        return cls(layers, sizes)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., o]` of `[..., i]`."""
        return torch.cat([layer(x) for layer in self.children()], -1)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"
