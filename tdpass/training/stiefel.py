"""Projections that are trained: a free matrix stands for the nearest one with orthonormal columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Polar(torch.autograd.Function):
    """P = U V^T for Q = U diag(s) V^T.

    The orthonormal columns nearest to those of Q, which must not depend on each other. With G the gradient by
    P and A = U^T G V, the gradient by Q is U ((A - A^T) / (s_i + s_j)) V^T + (I - U U^T) G V diag(1/s) V^T.
    No difference of singular values is divided by, so equal ones do no harm.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(q, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        p: Tensor = u @ vh
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        u, s, vh = ctx.saved_tensors
        turned = grad @ vh.T
        a = u.T @ turned
        inside = u @ ((a - a.T) / (s[:, None] + s[None]))
        outside = (turned - u @ a) / s
        slope: Tensor = (inside + outside) @ vh
        return slope


class Projection(nn.Module):
    """The proxy Q[n, r] of a projection of n channels to r, and `shift[r]`, added to projected channels."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.q = nn.Parameter(start.clone())
        self.shift = nn.Parameter(start.new_zeros(start.shape[1]))

    def forward(self) -> Tensor:
        """P[n, r]."""
        p: Tensor = Polar.apply(self.q)  # type: ignore[no-untyped-call]
        return p


class NarrowWeight(nn.Module):
    """A weight `[o, i, ...]` with its outputs projected, its inputs, or both, as a parametrization.

    A channel of the layer before is `spread` inputs here.
    """

    def __init__(self, after: Projection | None, before: Projection | None, spread: int) -> None:
        super().__init__()
        self.after, self.before, self.spread = after, before, spread

    def forward(self, weight: Tensor) -> Tensor:
        if self.before is not None:
            o, i, *kernel = weight.shape
            parts = weight.reshape(o, i // self.spread, self.spread, *kernel)
            mixed = torch.tensordot(parts, self.before(), dims=([1], [0])).movedim(-1, 1)
            weight = mixed.reshape(o, -1, *kernel)
        return weight if self.after is None else torch.tensordot(self.after().T, weight, dims=1)


class NarrowBias(nn.Module):
    """The bias of a layer whose outputs are projected, as a parametrization: P^T b + shift."""

    def __init__(self, after: Projection) -> None:
        super().__init__()
        self.after = after

    def forward(self, bias: Tensor) -> Tensor:
        projected: Tensor = self.after().T @ bias
        return projected + self.after.shift
