"""The fit behind cp: rank-one terms of a tensor by alternating least squares."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.alternating import (
    ANEW,
    Limit,
    State,
    alternate,
    normalized,
    solve_gram,
    squared_norm,
    suits_single,
)
from tdpass.formats.multilinear import Whitening
from tdpass.formats.spectrum import top_eigenpairs


class CpFit:
    """Alternating least squares for a whitened tensor, started from its slices."""

    def __init__(self, whitening: Whitening, tensor: Tensor) -> None:
        self.whitening, self.tensor, self.sizes = whitening, tensor, tensor.shape[2:]
        self.slices = tensor.flatten(2).permute(2, 0, 1).contiguous()
        self.energy = squared_norm(tensor)

    @functools.cached_property
    def single(self) -> CpFit:
        """The same in single precision, with caches of its own."""
        return CpFit(self.whitening, self.tensor.float())

    @functools.cached_property
    def terms(self) -> State:
        """All rank-one terms of slices `W x_h c x_w d` along the kernel's principal axes, strongest first.

        The terms are orthogonal, so their first r are a start whose error falls with r, and which needs no
        random numbers.
        """
        flat = self.slices.flatten(1)
        overlaps = (flat @ flat.T).reshape(*self.sizes, *self.sizes)
        bases = [top_eigenpairs(_traced(overlaps, axis), size)[1] for axis, size in enumerate(self.sizes)]
        cores = (functools.reduce(torch.kron, bases).T @ flat).reshape(self.slices.shape)
        lefts, rights, places = [], [], []
        for place, matrix in zip(itertools.product(*map(range, self.sizes)), cores, strict=True):
            wide = matrix.shape[0] <= matrix.shape[1]
            gram = matrix @ matrix.T if wide else matrix.T @ matrix
            _, vectors = top_eigenpairs(gram, len(gram))
            lefts.append(vectors if wide else matrix @ vectors)
            rights.append(matrix.T @ vectors if wide else vectors)
            places.extend([place] * len(gram))
        left, right = torch.cat(lefts, 1), torch.cat(rights, 1)
        order = (left.norm(dim=0) * right.norm(dim=0)).argsort(descending=True, stable=True)
        chosen = torch.tensor(places)[order]
        return (
            left[:, order],
            right[:, order],
            *(basis[:, chosen[:, axis]] for axis, basis in enumerate(bases)),
        )

    def start(self, rank: Rank) -> State:
        """The strongest terms."""
        return tuple(factor[:, : rank[0]] for factor in self.terms)

    def search(self, start: State, limit: Limit = ANEW) -> State:
        """Whitened factors `a[o, r], b[i, r], c[h, r], ...`, found from such."""
        rank = start[0].shape[1]
        macs, norm = 2 * self.slices.numel() * rank, self.energy**0.5
        single = self.single.sweep if suits_single(macs, norm) else None
        a, b, *kernels = alternate(start, self.sweep, norm, macs, single, limit)
        gram, wanted = b.T @ b * _gram(kernels), _combined(self._seen(b), khatri_rao(kernels))
        return (a + solve_gram(gram, (wanted - a @ gram).T).T, b, *kernels)

    def undo(self, state: State) -> State:
        """The factors without the whitening."""
        return tuple(self.whitening.undo(factor, 0, mode) for mode, factor in enumerate(state))

    def sweep(self, state: State) -> tuple[State, float]:
        """Solve for b, a, then each kernel factor.

        The two products with the whole tensor serve all of them.
        """
        a, b, *kernels = state
        pattern, gram = khatri_rao(kernels), _gram(kernels)
        wanted = torch.zeros_like(b.T)
        for matrix, weights in zip(self.slices, pattern, strict=True):
            wanted.addmm_((a * weights).T, matrix)
        b = _unit(solve_gram(a.T @ a * gram, wanted).T)
        seen = self._seen(b)
        inner = b.T @ b
        a = solve_gram(inner * gram, _combined(seen, pattern).T).T
        moments, gram = torch.stack([(image * a).sum(0) for image in seen]), a.T @ a * inner
        for mode in range(len(kernels)):
            others = kernels[:mode] + kernels[mode + 1 :]
            target = (
                moments.reshape(*(len(kernel) for kernel in kernels), -1)
                .movedim(mode, 0)
                .reshape(len(kernels[mode]), -1, a.shape[1])
            )
            kernels[mode] = solve_gram(gram * _gram(others), (target * khatri_rao(others)).sum(1).T).T
            if mode < len(kernels) - 1:
                kernels[mode] = _unit(kernels[mode])
        error = (
            self.energy
            + float((gram * _gram(kernels)).sum())
            - 2 * float((moments * khatri_rao(kernels)).sum())
        )
        norm = kernels[-1].norm(dim=0)
        kernels[-1] = _unit(kernels[-1])
        return (a * norm, b, *kernels), max(0.0, error) ** 0.5

    def _seen(self, b: Tensor) -> Tensor:
        """Every slice times b: `[(h w), o, r]`."""
        return (self.slices.flatten(0, 1) @ b).reshape(*self.slices.shape[:2], -1)


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product: `[h w, r]` of `[h, r]` and `[w, r]`; a row of ones for none."""
    product = torch.ones(1, 1, dtype=factors[0].dtype if factors else torch.float32)
    for factor in factors:
        product = (product[:, None] * factor).flatten(0, 1)
    return product


def _gram(factors: Sequence[Tensor]) -> Tensor:
    """Gram matrix of the Khatri-Rao product."""
    product = torch.ones(1, 1, dtype=factors[0].dtype if factors else torch.float32)
    for factor in factors:
        product = product * (factor.T @ factor)
    return product


def _combined(images: Tensor, weights: Tensor) -> Tensor:
    """`sum_p images[p] * weights[p]`, one p at a time: all at once would be as large as the tensor itself."""
    total = torch.zeros_like(images[0])
    for image, weight in zip(images, weights, strict=True):
        total.addcmul_(image, weight)
    return total


def _unit(factor: Tensor) -> Tensor:
    return normalized(factor, 0)[0]


def _traced(overlaps: Tensor, axis: int) -> Tensor:
    """The Gram matrix of the slices along one axis of the kernel, from those of all pairs of places."""
    axes = overlaps.dim() // 2
    for other in reversed([other for other in range(axes) if other != axis]):
        overlaps = overlaps.diagonal(dim1=other, dim2=other + overlaps.dim() // 2).sum(-1)
    return overlaps
