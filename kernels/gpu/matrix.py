"""Matrices that lie in memory as images or as plain rows, so that one kernel reads and writes both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """`[rows, columns]`: element (r, c) lies at `(r // inner) * outer + (r % inner) * step + c * column`.

    Positions of an image `[n, c, h, w]` are the rows of one with `inner = h w`, channels first or last alike.
    """

    data: Tensor
    rows: int
    columns: int
    inner: int
    outer: int
    step: int
    column: int

    @classmethod
    def of(cls, x: Tensor) -> Matrix:
        """A plain matrix `x[rows, columns]`."""
        return cls(x, x.shape[0], x.shape[1], max(1, x.shape[0]), 0, x.stride(0), x.stride(1))

    @classmethod
    def image(cls, x: Tensor) -> Matrix:
        """The positions of `x[n, c, h, w]`, which must be even along h and w (see `even`)."""
        n, c, h, w = x.shape
        return cls(x, n * h * w, c, h * w, x.stride(0), x.stride(3 if w > 1 else 2), x.stride(1))


def even(x: Tensor) -> Tensor:
    """The image x, copied to channels last unless its rows follow each other without a gap."""
    _, _, h, w = x.shape
    return (
        x
        if 1 in {h, w} or x.stride(2) == w * x.stride(3)
        else x.contiguous(memory_format=torch.channels_last)
    )


def flat(x: Tensor) -> Tensor:
    """`x[..., c]` as a matrix whose rows are contiguous; no copy where x is so."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
