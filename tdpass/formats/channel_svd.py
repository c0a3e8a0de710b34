"""channel_svd: a convolution as a k x k one with few output channels, then a 1x1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
from tdpass.formats.geometry import apply_dense, pointwise
from tdpass.formats.metric import Metric
from tdpass.formats.per_group import per_group
from tdpass.formats.pivoted import pivotable
from tdpass.formats.residual import with_residual
from tdpass.formats.spectrum import WeightedSvd
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site


class _Spectrum(Decomposition):
    def __init__(self, svd: WeightedSvd, site: Site) -> None:
        self.svd, self.site = svd, site

    def factors(self, rank: Rank) -> Factors:
        (r,) = rank
        left, right = self.svd.factors(r)
        last = left.reshape(self.site.o, r, *(1 for _ in self.site.kernel))
        return {"first": right.reshape(r, *self.site.shape[1:]).contiguous(), "last": last.contiguous()}

    def guarantee(self, rank: Rank) -> Guarantee:
        return Guarantee(self.svd.relative_error(rank[0]), "exact")


@register_format
@with_residual
@pivotable
@per_group
class ChannelSvd(Format):
    """W[o, i, h, w] = sum_r last[o, r] first[r, i, h, w]: an SVD of the `o x (i h w)` unfolding.

    Optimal in the metric for every rank (Zhang et al., Accelerating Very Deep Convolutional Networks, 2016).
    """

    name = "channel_svd"
    axes = range(1, 4)
    reader = "first"

    def fits(self, site: Site) -> bool:
        return super().fits(site) and site.o > 1

    def ranks(self, site: Site) -> Sequence[Rank]:
        return [(r,) for r in rank_grid(min(site.o, site.weights // site.o))]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Spectrum(WeightedSvd(weight.flatten(1), metric), site)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        (r,) = rank
        return {"first": (r, *site.shape[1:]), "last": (site.o, r, *(1 for _ in site.kernel))}

    def macs(self, site: Site, rank: Rank) -> int:
        return rank[0] * (
            site.weights // site.o * kind_of(site).positions(site) + site.o * site.out_positions
        )

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return (factors["last"].flatten(1) @ factors["first"].flatten(1)).reshape(site.shape)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return apply_dense(ops, x, f["first"], None, replace(site, shape=(rank[0], *site.shape[1:])))

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        return (Bond("last", "first", writes=True),)

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("last", pointwise(site.o, rank[0], len(site.kernel), site.name))
