"""svd: a linear layer as two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.base import (
    Decomposition,
    Factors,
    Format,
    Guarantee,
    Stage,
    rank_grid,
    register_format,
)
from tdpass.formats.bonds import Bond
from tdpass.formats.geometry import pointwise
from tdpass.formats.metric import Metric
from tdpass.formats.pivoted import pivotable
from tdpass.formats.residual import with_residual
from tdpass.formats.spectrum import WeightedSvd
from tdpass.ops import Ops, StorageOps, V
from tdpass.site import Site


class _Spectrum(Decomposition):
    def __init__(self, svd: WeightedSvd) -> None:
        self.svd = svd

    def factors(self, rank: Rank) -> Factors:
        left, right = self.svd.factors(rank[0])
        return {"v": right.contiguous(), "u": left.contiguous()}

    def guarantee(self, rank: Rank) -> Guarantee:
        return Guarantee(self.svd.relative_error(rank[0]), "exact")


@register_format
@with_residual
@pivotable
class Svd(Format):
    """W[o, i] = sum_r u[o, r] v[r, i]: two linear layers.

    Optimal in the metric for every rank (Eckart and Young 1936; whitened by the input covariance as in
    SVD-LLM, 2024). Pays below r = o i / (o + i).
    """

    name = "svd"
    axes = range(1)
    reader = "v"
    gives_rows = True

    def ranks(self, site: Site) -> Sequence[Rank]:
        return [(r,) for r in rank_grid(min(site.shape))]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Spectrum(WeightedSvd(weight, metric))

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        (r,) = rank
        return {"v": (r, site.i), "u": (site.o, r)}

    def macs(self, site: Site, rank: Rank) -> int:
        return rank[0] * (site.o + site.i) * site.out_positions

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return factors["u"] @ factors["v"]

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return ops.linear(x, f["v"], None)

    def rows(self, ops: StorageOps[V], numbers: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return ops.matmul(ops.lookup(f["u"], numbers), f["v"])

    def row_macs(self, site: Site, rank: Rank) -> int:
        return rank[0] * site.i

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        return (Bond("u", "v", writes=True) if site.o <= site.i else Bond("v", "u", writes=False),)

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("u", pointwise(site.o, rank[0], 0, site.name))
