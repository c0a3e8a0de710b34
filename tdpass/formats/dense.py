"""dense: the weight as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.base import Decomposition, Factors, Format, Guarantee, Stage, register_format
from tdpass.formats.metric import Metric
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site


@register_format
class Dense(Format):
    """W itself, of rank ()."""

    name = "dense"
    axes = range(4)
    offered = False

    def fits(self, site: Site) -> bool:
        return True

    def ranks(self, site: Site) -> Sequence[Rank]:
        return [()]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Itself(weight)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"kernel": site.shape}

    def macs(self, site: Site, rank: Rank) -> int:
        return site.weights * kind_of(site).positions(site)

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return factors["kernel"]

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return x

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("kernel", site)


class _Itself(Decomposition):
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def factors(self, rank: Rank) -> Factors:
        return {"kernel": self.weight.contiguous()}

    def guarantee(self, rank: Rank) -> Guarantee:
        return Guarantee(0.0, "exact")
