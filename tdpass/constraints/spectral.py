"""Formats whose ranks are those of unfoldings of the weight.

The spectra of these, and the projection by truncating them. Projections here are the formats' own methods in
the Frobenius norm, without factors: Gram matrices and their eigenvectors in float64, so that small singular
values are not lost, and the products with the weight in its own precision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.formats import Rank
from tdpass.formats.spectrum import top_eigenpairs
from tdpass.formats.trains import family_of, train_of
from tdpass.site import Site

_SWEEPS = 2
_SWEPT_WEIGHTS = 2**18


class Spectral(ABC):
    """One such format."""

    def ranks(self, site: Site, cuts: int | None) -> int:
        """How many ranks there are; `cuts` asks for a number where the format leaves a choice."""
        return 1

    def useful(self, site: Site, rank: Rank) -> Rank:
        """The smallest rank that allows the same weights."""
        return rank

    @abstractmethod
    def unfoldings(self, weight: Tensor, site: Site, cuts: int) -> list[Tensor]:
        """The matrices whose ranks the `cuts` ranks are."""

    @abstractmethod
    def nearest(self, weight: Tensor, site: Site, rank: Rank) -> Tensor:
        """The projection of a weight of the site's shape."""


@dataclass(frozen=True)
class OneMatrix(Spectral):
    """The best rank-r approximation of one unfolding, with the weight's axes `rows` as its rows.

    Eckart and Young 1936.
    """

    rows: tuple[int, ...]

    def unfoldings(self, weight: Tensor, site: Site, cuts: int) -> list[Tensor]:
        return [
            weight.permute(self._order(weight)).reshape(
                math.prod(weight.shape[axis] for axis in self.rows), -1
            )
        ]

    def nearest(self, weight: Tensor, site: Site, rank: Rank) -> Tensor:
        order = self._order(weight)
        folded = truncated(self.unfoldings(weight, site, 1)[0], rank[0]).reshape(
            [weight.shape[axis] for axis in order]
        )
        return folded.permute([order.index(axis) for axis in range(weight.dim())])

    def _order(self, weight: Tensor) -> tuple[int, ...]:
        return (*self.rows, *(axis for axis in range(weight.dim()) if axis not in self.rows))


class Tucker(Spectral):
    """Subspaces of the output and the input channels (HOSVD, De Lathauwer et al. 2000).

    Those of small weights are improved by orthogonal iteration.
    """

    def ranks(self, site: Site, cuts: int | None) -> int:
        return 2

    def useful(self, site: Site, rank: Rank) -> Rank:
        s, r = rank
        taps = math.prod(site.kernel)
        return min(s, r * taps), min(r, s * taps)

    def unfoldings(self, weight: Tensor, site: Site, cuts: int) -> list[Tensor]:
        return [weight.flatten(1), weight.transpose(0, 1).flatten(1)]

    def nearest(self, weight: Tensor, site: Site, rank: Rank) -> Tensor:
        s, r = rank
        o, i = site.o, site.i
        rows, columns = weight.reshape(o, -1), weight.transpose(0, 1).reshape(i, -1)
        inputs = basis(columns, r)
        outputs, core = _cut(inputs, columns, o, s)
        for _ in range(_SWEEPS if weight.numel() <= _SWEPT_WEIGHTS else 0):
            inputs, _ = _cut(outputs, rows, i, r)
            outputs, core = _cut(inputs, columns, o, s)
        spread = (outputs @ core).reshape(o, inputs.shape[1], -1).transpose(0, 1)
        return (
            (inputs @ spread.reshape(inputs.shape[1], -1))
            .reshape(i, o, -1)
            .transpose(0, 1)
            .reshape(weight.shape)
        )


class Train(Spectral):
    """TT-SVD (Oseledets 2011): cut after cut, the rest is projected on its leading left singular vectors."""

    def ranks(self, site: Site, cuts: int | None) -> int:
        return family_of(site).proposed[0] if cuts is None else cuts

    def useful(self, site: Site, rank: Rank) -> Rank:
        sizes, found = train_of(site, len(rank)).modes.shape, list(rank)
        for k in range(1, len(found)):
            found[k] = min(found[k], found[k - 1] * sizes[k])
        for k in reversed(range(len(found) - 1)):
            found[k] = min(found[k], found[k + 1] * sizes[k + 1])
        return tuple(found)

    def unfoldings(self, weight: Tensor, site: Site, cuts: int) -> list[Tensor]:
        tensor = train_of(site, cuts).modes.tensor(weight)
        return [tensor.reshape(math.prod(tensor.shape[:k]), -1) for k in range(1, cuts + 1)]

    def nearest(self, weight: Tensor, site: Site, rank: Rank) -> Tensor:
        modes = train_of(site, len(rank)).modes
        rest, bases = modes.tensor(weight), list[Tensor]()
        sizes = rest.shape
        rest = rest.reshape(sizes[0], -1)
        for size, r in zip(sizes[1:], rank, strict=True):
            bases.append(basis(rest, r))
            rest = bases[-1].T @ rest
            rest = rest.reshape(len(rest) * size, -1)
        for vectors in reversed(bases):
            rest = vectors @ rest.reshape(vectors.shape[1], -1)
        return modes.matrix(rest.reshape(sizes)).reshape(weight.shape)


SPECTRAL: Mapping[str, Spectral] = {
    "svd": OneMatrix((0,)),
    "channel_svd": OneMatrix((0,)),
    "input_svd": OneMatrix((1,)),
    "spatial_svd": OneMatrix((1, 2)),
    "tucker2": Tucker(),
    "tensor_train": Train(),
}


def basis(matrix: Tensor, count: int) -> Tensor:
    """Up to `count` left singular vectors as orthonormal columns, largest first.

    They are computed from the smaller Gram matrix.
    """
    rows, columns = matrix.shape
    count, exact = min(rows, columns, count), matrix.double()
    if rows <= columns:
        return top_eigenpairs((exact @ exact.T).cpu(), count)[1].to(matrix)
    # The images of the right vectors are the left ones times their singular values; QR keeps those of tiny
    # values orthonormal.
    images = exact @ top_eigenpairs((exact.T @ exact).cpu(), count)[1].to(exact)
    vectors: Tensor = torch.linalg.qr(images)[0]
    return vectors.to(matrix)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank."""
    if rank >= min(matrix.shape):
        return matrix.clone()
    if matrix.shape[0] > matrix.shape[1]:
        right = basis(matrix.T, rank)
        return (matrix @ right) @ right.T
    left = basis(matrix, rank)
    return left @ (left.T @ matrix)


def energies(matrix: Tensor) -> Tensor:
    """Squared singular values, descending, in float64 on the CPU."""
    exact = matrix.double()
    gram = exact @ exact.T if exact.shape[0] <= exact.shape[1] else exact.T @ exact
    values: Tensor = torch.linalg.eigvalsh(gram.cpu())
    return values.flip(0).clamp_min(0)


def _cut(vectors: Tensor, unfolded: Tensor, channels: int, count: int) -> tuple[Tensor, Tensor]:
    """A basis of the other channels in what `vectors` leave of the weight, and the core in both bases.

    The weight is `unfolded[a, (channels taps)]`.
    """
    inner = (
        (vectors.T @ unfolded).reshape(vectors.shape[1], channels, -1).transpose(0, 1).reshape(channels, -1)
    )
    other = basis(inner, count)
    return other, other.T @ inner
