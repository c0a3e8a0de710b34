"""pruned: a layer with fewer output or input channels, chosen together with its neighbour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from tdpass.errors import PlanError, UnsupportedError
from tdpass.form import Rank
from tdpass.formats.base import Decomposition, Factors, Format, Stage, register_format
from tdpass.formats.metric import Metric
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site


@register_format
class Pruned(Format):
    """W[kept outputs, kept inputs]: ranks are (outputs, inputs).

    Never offered for a site alone: the layer before must stop making, or the layer after stop reading, the removed
    channels.  Channels are removed by structured optimal brain surgery, see `tdpass.planner.surgeon`.
    """

    name = "pruned"
    axes = range(4)
    offered = False

    def fits(self, site: Site) -> bool:
        return False

    def ranks(self, site: Site) -> Sequence[Rank]:
        return [(site.o, site.i)]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        raise UnsupportedError(f"site {site.name!r} cannot be pruned alone; plan it together with its neighbour")

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"kept": (*rank, *site.kernel)}

    def macs(self, site: Site, rank: Rank) -> int:
        return math.prod(rank) * math.prod(site.kernel) * kind_of(site).positions(site)

    def outputs(self, site: Site, rank: Rank) -> int:
        return rank[0]

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return factors["kept"]

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return x

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("kept", replace(site, shape=(*rank, *site.kernel)))


@register_format
class Constant(Format):
    """W = 0: the layer answers with its bias, whatever it reads; the end of a residual branch that is dropped.

    Never offered for a site alone.  The output broadcasts against the sum it enters.
    """

    name = "constant"
    axes = range(4)
    offered = False

    def fits(self, site: Site) -> bool:
        return False

    def ranks(self, site: Site) -> Sequence[Rank]:
        return [()]

    def check_rank(self, site: Site, rank: Rank) -> None:
        if rank != ():
            raise PlanError(f"constant takes no rank, not {rank}, at site {site.name!r}")

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        raise UnsupportedError(f"site {site.name!r} cannot be dropped alone; plan its whole branch")

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {}

    def macs(self, site: Site, rank: Rank) -> int:
        return 0

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        raise UnsupportedError(f"site {site.name!r} was dropped; it has no weight")

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return x

    def apply(self, ops: Ops[V], x: V, f: Mapping[str, V], bias: V | None, site: Site, rank: Rank) -> V:
        assert bias is not None
        reaches = kind_of(site).reaches(site)
        assert reaches is not None
        return ops.fill(x, bias, reaches)
