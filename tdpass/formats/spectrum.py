"""Truncated singular value decompositions in a metric, through the smaller Gram matrix."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from tdpass.formats.metric import Metric, eigenpairs, eigenvalues

_SUBSET_FROM = 1536
_PARTS = 4


class WeightedSvd:
    """The best rank-r approximation of a matrix in the metric, for every r.

    `W ~ left @ right` of `factors(r)`, for W of o x d numbers in float64.

    With `M = G^1/2 W C^1/2 = U S V^T` the optimum is `What = G^-1/2 U_r U_r^T G^1/2 W = W C^1/2 V_r V_r^T
    C^-1/2`, so only the eigenvectors and roots of the smaller side are needed: `M M^T` takes G^1/2 and C,
    `M^T M` takes C^1/2 and G.  Nothing is computed before it is asked for: errors take eigenvalues alone,
    factors as many quarters of the vectors as their rank needs.  Quarters, so that the same rank gives the
    same factors whatever was asked for before.
    """

    def __init__(self, matrix: Tensor, metric: Metric) -> None:
        self.matrix, self._metric = matrix, metric
        self._wide = matrix.shape[0] <= matrix.shape[1]
        self._factors: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """The rank at which the factors reproduce any matrix of this shape."""
        return min(self.matrix.shape)

    @cached_property
    def total(self) -> float:
        """The squared weighted norm of W."""
        return max(0.0, float(self._gram.trace()))

    @cached_property
    def energies(self) -> Tensor:
        """`energies[k]` is the squared weighted singular value k, descending.

        The squared error at rank r is `total - energies[:r].sum()`.
        """
        return eigenvalues(self._gram).flip(0).clamp_min(0)

    def relative_error(self, rank: int) -> float:
        """`||W - What|| / ||W||` in the metric, exact (Eckart-Young)."""
        if self.total <= 0:
            return 0.0
        return math.sqrt(max(0.0, 1.0 - float(self.energies[:rank].sum()) / self.total))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """`left[o, r]` and `right[r, d]`; those of a lower rank are their first columns and rows."""
        quarter = -(-self.rank // _PARTS)
        count = min(self.rank, -(-rank // quarter) * quarter)
        if self._factors is None or self._factors[0].shape[1] != count:
            self._factors = self._solve(count)
        left, right = self._factors
        return left[:, :rank], right[:rank]

    @cached_property
    def _gram(self) -> Tensor:
        weighted = self._weighted
        if self._wide:
            return self._metric.times_inputs(weighted) @ weighted.T
        gram: Tensor = weighted.T @ self._metric.times_outputs(weighted)
        return gram

    @cached_property
    def _weighted(self) -> Tensor:
        """`G^1/2 W` where the Gram matrix is the output's, else `W C^1/2`."""
        if self._wide:
            roots = self._metric.output_roots
            return self.matrix if roots is None else roots[0] @ self.matrix
        inputs = self._metric.input_roots
        return self.matrix if inputs is None else _times(self.matrix, inputs[0])

    @cached_property
    def _vectors(self) -> Tensor:
        return top_eigenpairs(self._gram, self.rank)[1]

    def _solve(self, count: int) -> tuple[Tensor, Tensor]:
        few = self.rank >= _SUBSET_FROM and count <= self.rank // _PARTS
        vectors = top_eigenpairs(self._gram, count)[1] if few else self._vectors[:, :count]
        if self._wide:
            roots = self._metric.output_roots
            return _signed(vectors if roots is None else roots[1] @ vectors, vectors.T @ self._weighted)
        inputs = self._metric.input_roots
        return _signed(
            self._weighted @ vectors, vectors.T if inputs is None else _times(vectors.T, inputs[1])
        )


def _times(matrix: Tensor, root: Tensor) -> Tensor:
    """`matrix @ root` for a symmetric root, or its diagonal."""
    return matrix * root if root.dim() == 1 else matrix @ root


def top_eigenpairs(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues of a symmetric matrix, and their vectors as columns.

    Eigenvalues descend and are not negative.
    """
    size = gram.shape[0]
    if size >= _SUBSET_FROM and count <= size // _PARTS:
        import scipy.linalg  # noqa: PLC0415 - takes a third of a second, and only large matrices need it

        values, vectors = scipy.linalg.eigh(
            gram.numpy(), driver="evr", subset_by_index=[size - count, size - 1], check_finite=False
        )
        top, columns = torch.from_numpy(values), torch.from_numpy(vectors)
    else:
        top, columns = eigenpairs(gram)
    return top.flip(0)[:count].clamp_min(0), columns.flip(1)[:, :count].contiguous()


def _signed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Balance the two factors' norms and fix the sign, so that equal inputs give equal factors."""
    left_norm, right_norm = left.norm(dim=0).clamp_min(1e-150), right.norm(dim=1).clamp_min(1e-150)
    sign = torch.sign(right.gather(1, right.abs().argmax(1, keepdim=True)).squeeze(1))
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    scale = (right_norm / left_norm).sqrt() * sign
    return left * scale, right / scale[:, None]
