"""dense: the weight as it is, of what channels are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tdpass.errors import PlanError
from tdpass.form import Rank
from tdpass.formats.base import Decomposition, Factors, Format, Guarantee, Stage, register_format
from tdpass.formats.metric import Metric
from tdpass.kinds import kind_of
from tdpass.ops import Ops, StorageOps, V
from tdpass.site import Site


@register_format
class Dense(Format):
    """W itself, of rank ().

    Where no input channel is left, y = b at every position, or as what broadcasts to that.
    """

    name = "dense"
    axes = range(4)
    reader = "kernel"
    offered = False
    gives_rows = True

    def fits(self, site: Site) -> bool:
        return True

    def ranks(self, site: Site) -> Sequence[Rank]:
        return [()]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Itself(weight)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"kernel": site.shape} if site.i else {}

    def macs(self, site: Site, rank: Rank) -> int:
        return site.weights * kind_of(site).positions(site)

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return factors["kernel"] if site.i else torch.zeros(site.shape)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return x

    def rows(self, ops: StorageOps[V], numbers: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return ops.lookup(f["kernel"], numbers)

    def last_stage(self, site: Site, rank: Rank) -> Stage | None:
        return Stage("kernel", site) if site.i else None

    def apply(self, ops: Ops[V], x: V, f: Mapping[str, V], bias: V | None, site: Site, rank: Rank) -> V:
        if site.i:
            return super().apply(ops, x, f, bias, site, rank)
        reaches = kind_of(site).reaches(site)
        if bias is None or reaches is None:
            raise PlanError(
                f"site {site.name!r} reads nothing, has {'no' if bias is None else 'a'} bias, and its kind "
                f"is {site.kind}; plan again"
            )
        return ops.fill(x, bias, reaches)


class _Itself(Decomposition):
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def factors(self, rank: Rank) -> Factors:
        return {"kernel": self.weight.contiguous()}

    def guarantee(self, rank: Rank) -> Guarantee:
        return Guarantee(0.0, "exact")
