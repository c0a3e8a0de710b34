"""Formats with a remainder: what the factors of another format leave of the weight.

It stands beside them, as a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.base import Decomposition, Factors, Format, Guarantee, register_format
from tdpass.formats.geometry import apply_dense
from tdpass.formats.metric import Metric
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site

RESIDUAL = "residual"
ENDING = "_residual"


class Residual(Format):
    """W = U V + R: the factors of another format, and R, what they leave of the weight.

    As it is it saves nothing.  It is meant for forms that store R in few bits or with a support,
    `svd_residual 8 float16,float16,int4/64` or `svd_residual 8 float32 all,all,unstructured/5%`, where a few
    directions in many bits carry what few bits lose (Li et al., LQER, 2024; Saha et al., CALDERA, 2024).
    """

    offered = False
    remainder = RESIDUAL
    inner: ClassVar[Format]

    def fits(self, site: Site) -> bool:
        return not site.table and self.inner.fits(site)

    def ranks(self, site: Site) -> Sequence[Rank]:
        return self.inner.ranks(site)

    def begin(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        """`decompose`: what the other format fits is brought near 1, but not the remainder that is added."""
        return self.decompose(weight.double(), site, metric)

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _WithRemainder(self.inner, self.inner.begin(weight, site, metric), weight, site)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {**self.inner.shapes(site, rank), RESIDUAL: site.shape}

    def macs(self, site: Site, rank: Rank) -> int:
        return self.inner.macs(site, rank) + site.weights * kind_of(site).positions(site)

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return self.inner.reconstruct(factors, site) + factors[RESIDUAL]

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return self.apply(ops, x, f, None, site, rank)

    def apply(self, ops: Ops[V], x: V, f: Mapping[str, V], bias: V | None, site: Site, rank: Rank) -> V:
        return ops.add(
            apply_dense(ops, x, f[RESIDUAL], bias, site), self.inner.apply(ops, x, f, None, site, rank)
        )

    @property
    def leading(self) -> Format:
        return self.inner


class _WithRemainder(Decomposition):
    """Factors of another decomposition, and what they leave."""

    def __init__(self, inner: Format, leading: Decomposition, weight: Tensor, site: Site) -> None:
        self.inner, self.leading, self.weight, self.site = inner, leading, weight, site

    def factors(self, rank: Rank) -> Factors:
        self.leading.rough = self.rough
        return self._completed(self.leading.factors(rank))

    def refined(self, rank: Rank, factors: Factors) -> Factors:
        return self._completed(
            self.leading.refined(rank, {name: held for name, held in factors.items() if name != RESIDUAL})
        )

    def guarantee(self, rank: Rank) -> Guarantee:
        return Guarantee(0.0, "exact")

    def _completed(self, factors: Factors) -> Factors:
        rest = self.weight - self.inner.reconstruct(factors, self.site)
        return {**factors, RESIDUAL: rest.contiguous()}


def with_residual(cls: type[Format]) -> type[Format]:
    """Class decorator: make known, beside a format, the one that keeps what its factors leave."""
    inner = cls()
    own = {
        "name": inner.name + ENDING,
        "axes": inner.axes,
        "version": inner.version,
        "searched": inner.searched,
        "inner": inner,
        "__module__": cls.__module__,
        "__doc__": f"`{inner.name}`, and beside its factors what they leave of the weight.",
    }
    register_format(type(f"{cls.__name__}Residual", (Residual,), own))
    return cls
