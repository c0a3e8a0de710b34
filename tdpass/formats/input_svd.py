"""input_svd: a convolution as a 1x1 to few channels, then a k x k one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
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
from tdpass.formats.geometry import no_padding, unit
from tdpass.formats.metric import Metric
from tdpass.formats.per_group import per_group
from tdpass.formats.pivoted import pivotable
from tdpass.formats.shared_fit import SharedFit
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site


class _Fit(Decomposition):
    def __init__(self, fit: SharedFit, site: Site) -> None:
        self.fit, self.site = fit, site

    def factors(self, rank: Rank) -> Factors:
        (r,) = rank
        first, last = self.fit.solve(r, rough=self.rough)
        site = self.site
        return {
            "first": first.reshape(r, site.i, *unit(len(site.kernel))),
            "last": last.reshape(site.o, r, *site.kernel).contiguous(),
        }

    def guarantee(self, rank: Rank) -> Guarantee | None:
        return Guarantee(self.fit.start.relative_error(rank[0]), "exact") if self.fit.metric.plain else None


@register_format
@pivotable
@per_group
class InputSvd(Format):
    """W[o, i, h, w] = sum_r last[o, r, h, w] first[r, i]: an SVD of the `i x (o h w)` unfolding.

    Exact in the Frobenius norm; in a metric, alternating least squares from that start.
    """

    name = "input_svd"
    axes = range(1, 4)
    reader = "first"

    def fits(self, site: Site) -> bool:
        return super().fits(site) and site.i > 1 and math.prod(site.kernel) > 1

    def ranks(self, site: Site) -> Sequence[Rank]:
        return [(r,) for r in rank_grid(min(site.i, site.weights // site.i))]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Fit(SharedFit.of(weight, (1,), metric), site)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        (r,) = rank
        return {"first": (r, site.i, *unit(len(site.kernel))), "last": (site.o, r, *site.kernel)}

    def macs(self, site: Site, rank: Rank) -> int:
        return rank[0] * (site.i * site.in_positions + site.weights // site.i * kind_of(site).positions(site))

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return torch.einsum("orx,ri->oix", factors["last"].flatten(2), factors["first"].flatten(1)).reshape(
            site.shape
        )

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        axes = len(site.kernel)
        return ops.conv(x, f["first"], None, unit(axes), no_padding(axes), unit(axes))

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        return (Bond("first", "last", writes=False),)

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("last", replace(site, shape=(site.o, rank[0], *site.kernel)))
