"""tensor_train: a chain of cores, each with one part of the input, of the output, or of both."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import PlanError
from tdpass.form import Rank
from tdpass.formats.alternating import ANEW, ROUGH, State, squared_norm
from tdpass.formats.base import (
    Decomposition,
    Factors,
    Format,
    Guarantee,
    Stage,
    register_format,
    scaled_ranks,
)
from tdpass.formats.bonds import Bond
from tdpass.formats.metric import Metric, eigenvalues
from tdpass.formats.multilinear import Whitening, best_polished, improve_left, left_vectors, share_norm
from tdpass.formats.pivoted import pivotable
from tdpass.formats.trains import Train, family_of, train_of
from tdpass.ops import Ops, V
from tdpass.site import Site


class _Train(Decomposition):
    def __init__(self, weight: Tensor, site: Site, metric: Metric) -> None:
        self.weight, self.site, self.metric, self.matrix = weight, site, metric, weight.flatten(1)
        self._sweeps: dict[int, list[_Sweep]] = {}

    def sweeps(self, cut: Train) -> list[_Sweep]:
        """The plain and, in a metric, the whitened weight, cut as that train is."""
        if cut.cuts not in self._sweeps:
            self._sweeps[cut.cuts] = [
                _Sweep(whitening, self.weight) for whitening in Whitening.starts(self.metric, cut.modes)
            ]
        return self._sweeps[cut.cuts]

    def factors(self, rank: Rank) -> Factors:
        cut = train_of(self.site, len(rank))
        sweeps = self.sweeps(cut)[-1:] if self.rough else self.sweeps(cut)
        trains = [sweep.cores(rank) for sweep in sweeps]
        if self.metric.plain:
            return _packed(cut, trains[0])

        def unfolded(train: State) -> Tensor:
            return cut.modes.matrix(_contract(train))

        order, macs = range(len(rank), -1, -1), self.matrix.numel() * max(rank)
        *cores, last = best_polished(
            self.matrix,
            sweeps,
            trains,
            unfolded,
            self.metric,
            order,
            macs,
            ROUGH.work if self.rough else ANEW.work,
        )
        if cut.last_stage(rank) is not None:
            last = improve_left(self.matrix, last.flatten(1).T, _contract(cores).T, self.metric).T[:, :, None]
        return _packed(cut, (*cores, last))

    def guarantee(self, rank: Rank) -> Guarantee | None:
        """Root of the sum of squares of all discarded singular values (Oseledets 2011).

        Exact for one cut, a bound for more.
        """
        if not self.metric.plain:
            return None
        sweep = self.sweeps(train_of(self.site, len(rank)))[0]
        discarded = sum(float(tail[r]) for tail, r in zip(sweep.tails, rank, strict=True))
        value = min(1.0, discarded / sweep.energy) ** 0.5 if sweep.energy > 0 else 0.0
        return Guarantee(value, "exact" if len(rank) == 1 else "upper bound")


class _Sweep:
    """TT-SVD of a whitened weight, with what all ranks share."""

    def __init__(self, whitening: Whitening, weight: Tensor) -> None:
        self.whitening = whitening
        self.tensor = whitening.tensor(weight)
        self.energy = squared_norm(self.tensor)

    @functools.cached_property
    def first(self) -> Tensor:
        """All left singular vectors of the first unfolding."""
        return left_vectors(self.tensor.flatten(1), self.tensor.shape[0])

    @functools.cached_property
    def tails(self) -> list[Tensor]:
        """`tails[k][r]`: energy of the unfolding at cut k beyond its first r singular values."""
        found = []
        for k in range(1, self.tensor.dim()):
            unfolded = self.tensor.reshape(math.prod(self.tensor.shape[:k]), -1)
            gram = unfolded @ unfolded.T if unfolded.shape[0] <= unfolded.shape[1] else unfolded.T @ unfolded
            ascending = eigenvalues(gram).clamp_min(0)
            found.append(F.pad(ascending.cumsum(0), (1, 0)).flip(0))
        return found

    def cores(self, rank: Rank) -> State:
        """Whitened cores `[r, n, s]`, all but the last with orthonormal columns.

        A rank that a cut cannot use is filled with zeros.
        """
        sizes, found = self.tensor.shape, []
        rest, before = self.tensor.flatten(1), 1
        for k, r in enumerate(rank):
            rest = rest.reshape(before * sizes[k], -1)
            vectors = self.first[:, :r] if k == 0 else left_vectors(rest, r)
            vectors = F.pad(vectors, (0, r - vectors.shape[1]))
            found.append(vectors.reshape(before, sizes[k], r))
            rest, before = vectors.T @ rest, r
        return (*found, rest.reshape(before, sizes[-1], 1))

    def undo(self, cores: State) -> State:
        """The cores without the whitening."""
        return tuple(self.whitening.undo(core, 1, k) for k, core in enumerate(cores))


@register_format
@pivotable
class TensorTrain(Format):
    """W = G_1 G_2 ... G_d, a product of cores G_k[r, n, s] with s of one core equal to r of the next.

    TT-SVD (Oseledets 2011) of the weight as a tensor.  Linear: `n_k = (o_k i_k)`, one rank per cut, any
    number of cuts. Convolution: modes `i_1 .. i_a, (h w), o_1 .. o_a`, so 2 a ranks; a = 1 is three
    convolutions.  In a metric the weight is whitened mode by mode, and the cores are then improved in the
    metric itself by conjugate gradients.
    """

    name = "tensor_train"
    axes = range(4)
    searched: ClassVar[bool] = True

    def fits(self, site: Site) -> bool:
        return super().fits(site) and (not site.kernel or math.prod(site.kernel) > 1)

    def ranks(self, site: Site) -> Sequence[Rank]:
        found = {
            rank for count in family_of(site).proposed for rank in scaled_ranks(train_of(site, count).limits)
        }
        return sorted(
            found,
            key=lambda rank: (sum(math.prod(shape) for shape in self.shapes(site, rank).values()), rank),
        )

    def check_rank(self, site: Site, rank: Rank) -> None:
        lengths = family_of(site).allowed
        if len(rank) not in lengths:
            raise PlanError(
                f"{self.name} rank {rank} does not fit site {site.name!r} of shape {site.shape}; give one "
                f"of {list(lengths)} numbers"
            )
        limits = train_of(site, len(rank)).limits
        if not all(1 <= r <= limit for r, limit in zip(rank, limits, strict=True)):
            raise PlanError(
                f"{self.name} rank {rank} does not fit site {site.name!r} of shape {site.shape}; allowed is "
                f"1 to {limits} in each place"
            )

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Train(weight, site, metric)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        return train_of(site, len(rank)).shapes(rank)

    def macs(self, site: Site, rank: Rank) -> int:
        return train_of(site, len(rank)).macs(rank)

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        cut = train_of(site, len(factors) - 1)
        return cut.modes.matrix(_contract(cut.unpack(factors))).reshape(site.shape)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return train_of(site, len(rank)).features(ops, x, f, rank)

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        return train_of(site, count - 1).bonds

    def last_stage(self, site: Site, rank: Rank) -> Stage | None:
        return train_of(site, len(rank)).last_stage(rank)


def _packed(cut: Train, cores: State) -> Factors:
    return {name: factor.contiguous() for name, factor in cut.pack(share_norm(*cores)).items()}


def _contract(cores: Sequence[Tensor]) -> Tensor:
    """Product of cores `[r, n, s]` from the first on, `[(n_1 ... n_k), s]`.

    The last s is 1 for a whole train.
    """
    product = cores[0].flatten(0, 1)
    for core in cores[1:]:
        product = (product @ core.flatten(1)).reshape(-1, core.shape[2])
    return product
