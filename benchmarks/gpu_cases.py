"""What a layer of the GPU benchmark is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One layer: the three ways to run it, and the least the factored one reads, writes and computes."""

    name: str
    shape: str
    dense: Callable[..., Tensor]
    chain: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    x: Tensor
    factors: list[Tensor]
    weight: Tensor
    outputs: int
    flops: int
    stored: int | None = None

    @property
    def bytes(self) -> int:
        """Input, output and factors, each once; factors are `stored` in so many bytes, else as x is."""
        size = self.x.element_size()
        held = sum(t.numel() for t in self.factors) * size if self.stored is None else self.stored
        return (self.x.numel() + self.outputs) * size + held


def random(*shape: int, fan: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers that keep the size of what they multiply when `fan` of them are summed."""
    return (torch.randn(*shape, device="cuda") / math.sqrt(fan)).to(dtype)
