"""Truncated singular value decompositions in a metric, through the smaller Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from tdpass.formats.metric import Metric

_SUBSET_FROM = 1536


@dataclass(frozen=True)
class WeightedSvd:
    """`W ~ left[:, :r] @ right[:r]`, the best rank-r approximation in the metric for every r.

    `energies[k]` is the squared weighted singular value k, descending; `total` is the squared weighted norm of W, so the
    squared error at rank r is `total - energies[:r].sum()` exactly.
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    total: float

    def relative_error(self, rank: int) -> float:
        """`||W - What|| / ||W||` in the metric, exact (Eckart-Young)."""
        if self.total <= 0:
            return 0.0
        return math.sqrt(max(0.0, 1.0 - float(self.energies[:rank].sum()) / self.total))


def weighted_svd(matrix: Tensor, metric: Metric, rank: int | None = None) -> WeightedSvd:
    """Decompose `matrix` (o x d, float64) in the metric; `rank` limits how many directions are computed.

    With `M = G^1/2 W C^1/2 = U S V^T` the optimum is `What = G^-1/2 U_r U_r^T G^1/2 W`, so only the eigenvectors of
    `M M^T` (or of `M^T M`, where that is smaller) are needed, never those of both sides.
    """
    o, d = matrix.shape
    top = min(o, d) if rank is None else min(o, d, rank)
    roots = metric.output_roots
    weighted = matrix if roots is None else roots[0] @ matrix
    total = float((metric.times_inputs(weighted) * weighted).sum())
    if o <= d:
        values, vectors = top_eigenpairs(metric.times_inputs(weighted) @ weighted.T, top)
        left = vectors if roots is None else roots[1] @ vectors
        return WeightedSvd(*_signed(left, vectors.T @ weighted), values, total)
    inputs = metric.input_roots
    scaled = weighted if inputs is None else weighted * inputs[0] if inputs[0].dim() == 1 else weighted @ inputs[0]
    values, vectors = top_eigenpairs(scaled.T @ scaled, top)
    image = scaled @ vectors
    left = image if roots is None else roots[1] @ image
    right = vectors.T
    if inputs is not None:
        right = right * inputs[1] if inputs[1].dim() == 1 else right @ inputs[1]
    return WeightedSvd(*_signed(left, right), values, total)


def top_eigenpairs(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues of a symmetric matrix, descending and not negative, and their vectors as columns."""
    size = gram.shape[0]
    if size >= _SUBSET_FROM and count <= size // 2:
        values, vectors = scipy.linalg.eigh(gram.numpy(), driver="evr", subset_by_index=[size - count, size - 1], check_finite=False)
        top, columns = torch.from_numpy(values), torch.from_numpy(vectors)
    else:
        top, columns = torch.linalg.eigh(gram)
    return top.flip(0)[:count].clamp_min(0), columns.flip(1)[:, :count].contiguous()


def _signed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Balance the two factors' norms and fix the sign, so that equal inputs give equal factors."""
    left_norm, right_norm = left.norm(dim=0).clamp_min(1e-150), right.norm(dim=1).clamp_min(1e-150)
    sign = torch.sign(right.gather(1, right.abs().argmax(1, keepdim=True)).squeeze(1))
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    scale = (right_norm / left_norm).sqrt() * sign
    return left * scale, right / scale[:, None]
