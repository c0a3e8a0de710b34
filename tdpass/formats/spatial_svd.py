"""spatial_svd: a k x k convolution as k x 1, then 1 x k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.base import Decomposition, Factors, Format, Guarantee, Stage, rank_grid, register_format
from tdpass.formats.bonds import Bond
from tdpass.formats.geometry import apply_dense, no_padding, unit
from tdpass.formats.metric import Metric
from tdpass.formats.per_group import per_group
from tdpass.formats.pivoted import pivotable
from tdpass.formats.shared_fit import SharedFit
from tdpass.formats.tap_bond import TapBond
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site


def _first(site: Site, r: int) -> Site:
    """The layer along the first spatial axis."""
    rest = len(site.kernel) - 1
    return replace(
        site,
        shape=(r, site.i, site.kernel[0], *unit(rest)),
        stride=(site.stride[0], *unit(rest)),
        padding=(site.padding[0], *no_padding(rest)),
        dilation=(site.dilation[0], *unit(rest)),
    )


def _last(site: Site, r: int) -> Site:
    """The layer along the other spatial axes."""
    return replace(
        site,
        shape=(site.o, r, 1, *site.kernel[1:]),
        stride=(1, *site.stride[1:]),
        padding=((0, 0), *site.padding[1:]),
        dilation=(1, *site.dilation[1:]),
    )


class _Fit(Decomposition):
    def __init__(self, fit: SharedFit, site: Site) -> None:
        self.fit, self.site = fit, site

    def factors(self, rank: Rank) -> Factors:
        (r,) = rank
        first, last = self.fit.solve(r, rough=self.rough)
        return {
            "first": first.reshape(_first(self.site, r).shape).contiguous(),
            "last": last.reshape(_last(self.site, r).shape).contiguous(),
        }

    def guarantee(self, rank: Rank) -> Guarantee | None:
        return Guarantee(self.fit.start.relative_error(rank[0]), "exact") if self.fit.metric.plain else None


@register_format
@pivotable
@per_group
class SpatialSvd(Format):
    """W[o, i, h, w] = sum_r last[o, r, w] first[r, i, h]: an SVD of the `(i h) x (o w)` unfolding.

    Exact in the Frobenius norm (Jaderberg et al. 2014); in a metric, alternating least squares from that
    start. Pays below r = o i k / (o + i) at stride 1.
    """

    name = "spatial_svd"
    axes = range(2, 4)
    reader = "first"

    def fits(self, site: Site) -> bool:
        return super().fits(site) and site.kernel[0] > 1 and math.prod(site.kernel[1:]) > 1

    def ranks(self, site: Site) -> Sequence[Rank]:
        return [(r,) for r in rank_grid(min(site.i * site.kernel[0], site.o * math.prod(site.kernel[1:])))]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Fit(SharedFit.of(weight, (1, 2), metric), site)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        (r,) = rank
        return {"first": _first(site, r).shape, "last": _last(site, r).shape}

    def macs(self, site: Site, rank: Rank) -> int:
        (r,), kind = rank, kind_of(site)
        first, rest = kind.positions(site, range(1)), kind.positions(site, range(1, site.axes))
        return r * (site.i * site.kernel[0] * first + site.o * math.prod(site.kernel[1:]) * rest)

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        first, last = factors["first"], factors["last"]
        r = first.shape[0]
        return torch.einsum(
            "orw,rih->oihw", last.reshape(site.o, r, -1), first.reshape(r, site.i, -1)
        ).reshape(site.shape)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return apply_dense(ops, x, f["first"], None, _first(site, rank[0]))

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        return (TapBond("last", "first", writes=True),)

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("last", _last(site, rank[0]))
