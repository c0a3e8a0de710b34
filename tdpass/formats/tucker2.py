"""tucker2: a convolution as 1x1, k x k on few channels, 1x1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.base import Decomposition, Factors, Format, Guarantee, Stage, register_format
from tdpass.formats.bonds import Bond
from tdpass.formats.geometry import apply_dense, no_padding, pointwise, unit
from tdpass.formats.metric import Metric
from tdpass.formats.per_group import per_group
from tdpass.formats.pivoted import pivotable
from tdpass.formats.shared_fit import SharedFit
from tdpass.formats.spectrum import WeightedSvd
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site

_STEPS = 8


class _Fit(Decomposition):
    """Given `first`, the core and `last` are a reduced-rank regression in closed form.

    `first` is fitted for a free core.
    """

    def __init__(self, fit: SharedFit, site: Site) -> None:
        self.fit, self.site = fit, site

    @cached_property
    def outputs(self) -> WeightedSvd:
        """The unfolding whose tail is what the output rank cuts off."""
        return WeightedSvd(self.fit.weight.flatten(1), self.fit.metric)

    def factors(self, rank: Rank) -> Factors:
        s, r = rank
        site, axes = self.site, len(self.site.kernel)
        first, rest, split = self.fit.solve_split(r, s, self.rough)
        if split is None:
            split = WeightedSvd(rest.flatten(1), Metric(None, self.fit.metric.outputs))
        left, right = split.factors(s)
        unused = s - len(right)  # more outputs than r channels of that many taps can tell apart
        left, right = F.pad(left, (0, unused)), F.pad(right, (0, 0, 0, unused))
        core = right.reshape(s, r, *site.kernel)
        return {
            "first": first.reshape(r, site.i, *unit(axes)).contiguous(),
            "core": core.contiguous(),
            "last": left.reshape(site.o, s, *unit(axes)).contiguous(),
        }

    def guarantee(self, rank: Rank) -> Guarantee | None:
        if not self.fit.metric.plain:
            return None
        tails = (self.outputs.relative_error(rank[0]), self.fit.start.relative_error(rank[1]))
        return Guarantee(min(1.0, math.hypot(*tails)), "upper bound")


@register_format
@pivotable
@per_group
class Tucker2(Format):
    """W[o, i, h, w] = sum_rs last[o, s] core[s, r, h, w] first[r, i]; ranks are (s, r).

    Partial Tucker decomposition on the channel modes (Kim et al. 2016), started from the HOSVD and improved
    by alternating least squares in the metric, so the HOSVD bound ||tail_o||^2 + ||tail_i||^2 holds.
    """

    name = "tucker2"
    axes = range(1, 4)
    reader = "first"

    def fits(self, site: Site) -> bool:
        return super().fits(site) and min(site.o, site.i) > 1 and math.prod(site.kernel) > 1

    def ranks(self, site: Site) -> Sequence[Rank]:
        top = self._top(site)
        grids = [sorted({max(1, round(limit * k / _STEPS)) for k in range(1, _STEPS + 1)}) for limit in top]
        pairs = {
            (s, r)
            for s in grids[0]
            for r in grids[1]
            if 0.45 <= (s * top[1]) / (r * top[0]) <= 2.2 and s <= r * math.prod(site.kernel)
        }
        return sorted(pairs | {(1, 1), top}, key=lambda rank: (self.cost(site, rank).params, rank))

    def _top(self, site: Site) -> tuple[int, int]:
        return min(site.o, site.weights // site.o), min(site.i, site.weights // site.i)

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Fit(SharedFit.of(weight, (1,), metric), site)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        s, r = rank
        ones = unit(len(site.kernel))
        return {"first": (r, site.i, *ones), "core": (s, r, *site.kernel), "last": (site.o, s, *ones)}

    def macs(self, site: Site, rank: Rank) -> int:
        s, r = rank
        return r * site.i * site.in_positions + s * (
            r * math.prod(site.kernel) * kind_of(site).positions(site) + site.o * site.out_positions
        )

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        first, core, last = (
            factors["first"].flatten(1),
            factors["core"].flatten(2),
            factors["last"].flatten(1),
        )
        return torch.einsum("os,srx,ri->oix", last, core, first).reshape(site.shape)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        s, r = rank
        axes = len(site.kernel)
        x = ops.conv(x, f["first"], None, unit(axes), no_padding(axes), unit(axes))
        return apply_dense(ops, x, f["core"], None, replace(site, shape=(s, r, *site.kernel)))

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        return Bond("first", "core", writes=False), Bond("last", "core", writes=True)

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("last", pointwise(site.o, rank[0], len(site.kernel), site.name))
