"""Formats without what their factors hold twice.

Of every axis of r that two factors share, r x r numbers follow from the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdpass.errors import PlanError
from tdpass.form import Rank
from tdpass.formats.base import FORMATS, Decomposition, Factors, Format, Guarantee, register_format
from tdpass.formats.bonds import ORDER, Bond
from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.formats.operands import Sparing
from tdpass.ops import Ops, V
from tdpass.site import Site

PIVOT, LEAD = "_pivot", "_lead"
_FACTS = ("axes", "version", "searched")


class Pivoted(Format):
    """Another format whose factors hold no identity: U V with U = P [I; C] U_p becomes C and B = U_p V.

    U_p are r rows of U that make up all others by small coefficients C (pivoting factorization, Zhao et al.
    2025).  A factor that writes the output answers `P [h; C h]` to `h = B x`, one that reads the input `x_p +
    D x_rest`, so both numbers and multiply-adds fall by r^2 for every axis that two factors share: from r (o
    + i) to r (o + i - r) for two matrices, which is less than o i at any rank below full.  Nothing is lost.
    `ordered` says that P is stored, else it is 1: the pivots are the leading channels.
    """

    offered = False
    exact_at_full_rank = False
    inner: ClassVar[Format]
    ordered: ClassVar[bool]

    def fits(self, site: Site) -> bool:
        return not site.table and self.ordered and self.inner.fits(site) and bool(self.ranks(site))

    def ranks(self, site: Site) -> Sequence[Rank]:
        spared = [rank for rank in self.inner.ranks(site) if self.spares(site, rank)]
        return sorted(spared, key=lambda rank: (self.cost(site, rank).params, rank))

    def spares(self, site: Site, rank: Rank) -> bool:
        """Whether factors of that rank hold anything twice."""
        return bool(self._bonds(site, self.inner.shapes(site, rank)))

    def check_rank(self, site: Site, rank: Rank) -> None:
        try:
            self.inner.check_rank(site, rank)
        except PlanError as error:
            raise PlanError(f"{self.name} is made of {error}") from None
        if not self.spares(site, rank):
            raise PlanError(
                f"{self.name} rank {rank} has nothing to spare at site {site.name!r} of shape {site.shape}; "
                f"plan it as {self.inner.name}"
            )

    def begin(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Spared(self, self.inner.begin(weight, site, metric), site)

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Spared(self, self.inner.decompose(weight, site, metric), site)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        shapes = self.inner.shapes(site, rank)
        stored = {bond.factor: bond.stored(shapes[bond.factor]) for bond in self._bonds(site, shapes)}
        return {
            name: shape
            for key, whole in shapes.items()
            for name, shape in stored.get(key, {key: whole}).items()
        }

    def orders(self, site: Site, rank: Rank) -> dict[str, int]:
        shapes = self.inner.shapes(site, rank)
        bonds = self._bonds(site, shapes) if self.ordered else []
        return {bond.order: bond.ordered(shapes[bond.factor]) for bond in bonds}

    def macs(self, site: Site, rank: Rank) -> int:
        shapes = self.inner.shapes(site, rank)
        spared = 0
        for bond in self._bonds(site, shapes):
            whole = shapes[bond.factor]
            left = sum(map(math.prod, bond.stored(whole).values()))
            spared += (math.prod(whole) - left) * bond.uses(site, shapes)
        return self.inner.macs(site, rank) - spared

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return self.inner.reconstruct(self.to_chain(factors, site), site)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return self.apply(ops, x, f, None, site, rank)

    def apply(self, ops: Ops[V], x: V, f: Mapping[str, V], bias: V | None, site: Site, rank: Rank) -> V:
        held: dict[str, Any] = dict(f)
        sparing: Any = Sparing(ops)
        shapes = self.inner.shapes(site, rank)
        for bond in self._bonds(site, shapes):
            held[bond.factor] = bond.operand(f, shapes[bond.factor])
        y: V = self.inner.apply(sparing, x, held, bias, site, rank)
        return y

    @property
    def chain(self) -> Format:
        return self.inner

    def from_chain(self, factors: Factors, site: Site) -> Factors:
        found: Factors = dict(factors)
        stored: dict[str, Factors] = {}
        orders: Factors = {}
        shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
        for bond in self._bonds(site, shapes):
            made = bond.pivot(found[bond.factor], ordered=self.ordered)
            stored[bond.factor] = dict(made.factors)
            orders |= {} if made.order is None else {bond.order: made.order}
            found[bond.partner] = bond.absorbed(found[bond.partner], made.square)
        kept = {name: part for key in found for name, part in stored.get(key, {key: found[key]}).items()}
        return {**kept, **orders}

    def to_chain(self, factors: Factors, site: Site) -> Factors:
        shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
        bonds = self.inner.bonds(site, _count(shapes))
        whole = {bond.factor: bond.whole(factors) for bond in bonds if bond.spared(shapes, site)}
        names = dict.fromkeys(name.partition("_")[0] for name in factors)
        return {name: whole[name] if name in whole else factors[name] for name in names}

    def _bonds(self, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> list[Bond]:
        """The axes that there is something to spare of in whole factors of those shapes."""
        return [bond for bond in self.inner.bonds(site, len(shapes)) if bond.spares(shapes)]


def _count(names: Iterable[str]) -> int:
    """Of how many factors these are the stored parts."""
    return len({name.partition("_")[0] for name in names})


class _Spared(Decomposition):
    """The factors of another decomposition, without what they hold twice."""

    def __init__(self, fmt: Pivoted, inner: Decomposition, site: Site) -> None:
        self.format, self.inner, self.site = fmt, inner, site

    def factors(self, rank: Rank) -> Factors:
        self.inner.rough = self.rough
        return self.format.from_chain(self.inner.factors(rank), self.site)

    def refined(self, rank: Rank, factors: Factors) -> Factors:
        self.inner.rough = self.rough
        return self.format.from_chain(
            self.inner.refined(rank, self.format.to_chain(factors, self.site)), self.site
        )

    def guarantee(self, rank: Rank) -> Guarantee | None:
        return self.inner.guarantee(rank)


def spared_formats(name: str, site: Site, rank: Rank) -> list[str]:
    """Formats that store what the named one stores at that rank in fewer numbers.

    Those that need no order of channels come first.
    """
    chain = FORMATS.get(name).chain.name
    lean = [
        fmt
        for ending in (LEAD, PIVOT)
        if chain + ending in FORMATS and isinstance(fmt := FORMATS.get(chain + ending), Pivoted)
    ]
    names = [fmt.name for fmt in lean if fmt.spares(site, rank)]
    return names[: names.index(name)] if name in names else names


def reordered(layer: Layer, order: Tensor) -> Layer | None:
    """The layer where it reads inputs in another order, `x[order]`.

    None where no factor of its own holds them as they are.
    """
    chain = FORMATS.get(layer.format).chain
    if layer.form.encoded or not chain.reader:
        return None
    reads = next(
        (
            bond
            for bond in chain.bonds(layer.site, _count(layer.factors))
            if not bond.writes and layer.format != chain.name
        ),
        None,
    )
    if reads is None:
        return replace(
            layer,
            factors={
                **layer.factors,
                chain.reader: layer.factors[chain.reader].index_select(1, order).contiguous(),
            },
        )
    held = layer.factors.get(reads.order)
    if held is None:
        return None
    return replace(layer, factors={**layer.factors, reads.order: order.argsort()[held.long()].to(held.dtype)})


def led(layer: Layer, after: Layer, spread: int = 1) -> tuple[Layer, Layer] | None:
    """The layer with its pivots in the lead, and the one that alone reads what it makes.

    That has each channel `spread` times, with its inputs so. None where the layer, which is a pivoted one,
    has to put its inputs in an order too, or the other cannot take them in another.
    """
    orders = {name: value for name, value in layer.factors.items() if name.endswith(ORDER)}
    chain = FORMATS.get(layer.format).chain
    bonds = {bond.order: bond for bond in chain.bonds(layer.site, _count(layer.factors))}
    if len(orders) != 1 or not all(bonds[name].writes for name in orders):
        return None
    (inverse,) = orders.values()
    order = inverse.long().argsort()
    inputs = (order[:, None] * spread + torch.arange(spread)).flatten()
    other = reordered(after, inputs) if after.site.i == len(inputs) else None
    if other is None:
        return None
    form = replace(layer.form, format=FORMATS.get(layer.format).chain.name + LEAD)
    factors = {name: value for name, value in layer.factors.items() if name not in orders}
    return replace(
        layer, form=form, factors=factors, bias=None if layer.bias is None else layer.bias[order]
    ), other


def pivotable(cls: type[Format]) -> type[Format]:
    """Class decorator: make known, beside a format whose factors have bonds, the two that store less.

    Those are without what its factors hold twice.
    """
    inner = cls()
    facts = {fact: getattr(inner, fact) for fact in _FACTS}
    for ending, ordered in ((PIVOT, True), (LEAD, False)):
        own = {
            "name": inner.name + ending,
            "inner": inner,
            "ordered": ordered,
            "__module__": cls.__module__,
            "__doc__": f"`{inner.name}` without what its factors hold twice.",
        }
        register_format(type(f"{cls.__name__}{ending}", (Pivoted,), {**facts, **own}))
    return cls
