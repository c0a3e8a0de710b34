"""The norm of a stream that is stored in fewer coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.documents import Count, Size
from tdpass.layers.shortcuts import lead


@dataclass(frozen=True)
class NormShape:
    """How many channels such a norm reads and writes, and whether one channel behind is left out.

    `writes` is 0 where it has no adapter, `leads` where it has no shortcut.
    """

    reads: Size
    eps: float
    drops: bool
    writes: Count = 0
    shift: bool = False
    leads: Count = 0


class SlicedNorm(nn.Module):
    """`adapter(t)` with `t = c / sqrt(|c|^2 / reads + eps)` and c the first `reads` channels.

    The adapter need not be there. It stands for a LayerNorm or RMSNorm whose scale and shift became part of
    its readers, or of the adapter: a linear layer, and a site like others.  So is the shortcut, through which
    x goes to the sum that adds to it, in a module that `leads_sums`.
    """

    def __init__(
        self, shape: NormShape, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.adapter: nn.Module | None = None
        if shape.writes:
            self.adapter = nn.Linear(shape.reads, shape.writes, bias=shape.shift, dtype=dtype, device="meta")
            self.adapter.to_empty(device=device or "cpu")
        self.shortcut: nn.Module | None = None
        if shape.leads:
            count = shape.reads + shape.drops
            self.shortcut = nn.Linear(count, shape.leads, bias=False, dtype=dtype, device="meta")
            self.shortcut.to_empty(device=device or "cpu")

    @property
    def eps(self) -> float:
        """What is added to the mean square."""
        return self.shape.eps

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            lead(x, self.shortcut)
        c = x[..., : self.shape.reads] if self.shape.drops else x
        t = F.rms_norm(c, (self.shape.reads,), None, self.shape.eps)
        return t if self.adapter is None else self.adapter(t)

    def extra_repr(self) -> str:
        return f"{self.shape.reads} channels, eps={self.shape.eps:.3g}"
