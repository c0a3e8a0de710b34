"""Unfolding activations into the rows that a layer's weight multiplies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.site import Site


def patches(x: Tensor, site: Site, limit: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The input of a layer as rows `[positions, i * prod(kernel)]`, in the order of `weight.flatten(1)`.

    `x` is `[..., i]` for a linear layer and `[n, i, *size]` for a convolution; rows run over samples, then output positions.
    `limit` asks for a random subset of at most that many rows, gathered without unfolding the rest.
    """
    if site.kind == "linear":
        rows = x.reshape(-1, x.shape[-1])
        chosen = _subset(rows.shape[0], limit, generator)
        return rows if chosen is None else rows[chosen]
    if any(before or after for before, after in site.padding):
        x = F.pad(x, [size for pair in reversed(site.padding) for size in pair])
    for axis, (kernel, stride, dilation) in enumerate(zip(site.kernel, site.stride, site.dilation, strict=True), start=2):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    axes = len(site.kernel)
    windows = x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    positions = windows.shape[: 1 + axes]
    chosen = _subset(math.prod(positions), limit, generator)
    if chosen is not None:
        windows = windows[torch.unravel_index(chosen, positions)]
    return windows.reshape(-1, site.weights // site.o)


def working(rows: Tensor) -> Tensor:
    """The rows in a type to sum products in: float64 stays, everything narrower becomes float32."""
    return rows if rows.dtype == torch.float64 else rows.float()


def _subset(rows: int, limit: int | None, generator: torch.Generator | None) -> Tensor | None:
    return None if limit is None or rows <= limit else torch.randperm(rows, generator=generator)[:limit]


def output_rows(y: Tensor, site: Site) -> Tensor:
    """The output of a layer as rows `[positions, o]`, matching `patches`."""
    return y.reshape(-1, y.shape[-1]) if site.kind == "linear" else y.movedim(1, -1).reshape(-1, y.shape[1])
