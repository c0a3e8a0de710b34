"""Formats without what their factors hold twice.

Of every axis of r that two factors share, r x r numbers follow from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from tdpass.errors import PlanError
from tdpass.form import Rank
from tdpass.formats.base import FORMATS, Bond, Decomposition, Factors, Format, Guarantee, register_format
from tdpass.formats.geometry import unit
from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.formats.pivots import choose_pivots, leading_coefficients, order_of
from tdpass.ops import Ops, Pads, V
from tdpass.site import Site

PIVOT, LEAD = "_pivot", "_lead"
_ORDER = "_order"
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
        return self.ordered and self.inner.fits(site) and bool(self.ranks(site))

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
        return {
            **shapes,
            **{
                bond.factor: bond.with_channels(shapes[bond.factor], bond.width(site) - r)
                for bond, r in self._bonds(site, shapes)
            },
        }

    def orders(self, site: Site, rank: Rank) -> dict[str, int]:
        bonds = self._bonds(site, self.inner.shapes(site, rank)) if self.ordered else []
        return {_order(bond): bond.width(site) for bond, _ in bonds}

    def macs(self, site: Site, rank: Rank) -> int:
        bonds = self._bonds(site, self.inner.shapes(site, rank))
        return self.inner.macs(site, rank) - sum(
            r * r * (site.out_positions if bond.writes else site.in_positions) for bond, r in bonds
        )

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return self.inner.reconstruct(self.to_chain(factors, site), site)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return self.apply(ops, x, f, None, site, rank)

    def apply(self, ops: Ops[V], x: V, f: Mapping[str, V], bias: V | None, site: Site, rank: Rank) -> V:
        held: dict[str, Any] = dict(f)
        sparing: Any = _Sparing(ops)
        for bond, r in self._bonds(site, self.inner.shapes(site, rank)):
            held[bond.factor] = _Spare(f[bond.factor], f.get(_order(bond)), bond.writes, r, bond.width(site))
        y: V = self.inner.apply(sparing, x, held, bias, site, rank)
        return y

    @property
    def chain(self) -> Format:
        return self.inner

    def from_chain(self, factors: Factors, site: Site) -> Factors:
        found, orders = dict(factors), {}
        for bond, r in self._bonds(site, {name: tuple(factor.shape) for name, factor in factors.items()}):
            matrix = bond.matrix(found[bond.factor])
            n = len(matrix)
            pivots, coefficients = (
                choose_pivots(matrix) if self.ordered else (torch.arange(r), leading_coefficients(matrix))
            )
            if self.ordered:
                order = order_of(pivots, n)
                orders[_order(bond)] = (order.argsort() if bond.writes else order).int()
            spared = bond.with_channels(found[bond.factor].shape, n - r)
            found[bond.factor] = (
                (coefficients if bond.writes else coefficients.T).reshape(spared).contiguous()
            )
            found[bond.partner] = bond.absorbed(found[bond.partner], matrix[pivots])
        return {**found, **orders}

    def to_chain(self, factors: Factors, site: Site) -> Factors:
        found = {name: factors[name] for name in factors if not name.endswith(_ORDER)}
        for bond, r in self._bonds(site, {name: tuple(factor.shape) for name, factor in found.items()}):
            coefficients = bond.matrix(found[bond.factor])
            whole = torch.cat(
                [torch.eye(r, dtype=coefficients.dtype, device=coefficients.device), coefficients]
            )
            if self.ordered:
                order = factors[_order(bond)].long()
                whole = whole[order if bond.writes else order.argsort()]
            shape = bond.with_channels(found[bond.factor].shape, len(whole))
            found[bond.factor] = (whole if bond.writes else whole.T).reshape(shape).contiguous()
        return found

    def _bonds(self, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[Bond, int]]:
        """The axes that there is something to spare of, each with its size."""
        found = [(bond, bond.size(shapes)) for bond in self.inner.bonds(site) if bond.factor in shapes]
        return [(bond, r) for bond, r in found if r < bond.width(site)]


def _order(bond: Bond) -> str:
    return bond.factor + _ORDER


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


@dataclass(frozen=True)
class _Spare:
    """A factor of `width` rows (columns) of which `r` are those of an identity, and `rest` the others."""

    rest: Any
    order: Any
    writes: bool
    r: int
    width: int


class _Sparing(Generic[V]):
    """Products with such factors: what meets an identity is passed on; all else is left to `ops`."""

    def __init__(self, ops: Ops[V]) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def linear(self, x: V, weight: V, bias: V | None) -> V:
        if not isinstance(weight, _Spare):
            return self.ops.linear(x, weight, bias)
        return self._product(x, weight, bias, 0, self.ops.linear)

    def conv(
        self,
        x: V,
        weight: V,
        bias: V | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> V:
        def pointwise(read: V, kernel: V, shift: V | None) -> V:
            return self.ops.conv(read, kernel, shift, stride, padding, dilation, groups)

        return (
            self._product(x, weight, bias, len(stride), pointwise)
            if isinstance(weight, _Spare)
            else pointwise(x, weight, bias)
        )

    def _product(self, x: V, spare: _Spare, bias: V | None, axes: int, product: Any) -> V:
        axis = -1 - axes
        if spare.writes:
            return self._written(x, spare, bias, axis, product)
        first, rest = self._read(x, spare, axis)
        return self.ops.add(first, product(rest, spare.rest, bias))

    def _written(self, h: V, spare: _Spare, bias: V | None, axis: int, product: Any) -> V:
        """`P [h; C h] + b`."""
        if spare.order is None and bias is not None:
            along = (spare.r, *unit(-1 - axis))
            first = self.ops.add(h, self.ops.reshape(self.ops.part(bias, -1, 0, spare.r), along))
            return self.ops.concat(
                first, product(h, spare.rest, self.ops.part(bias, -1, spare.r, spare.width)), axis
            )
        y: V = self.ops.concat(h, product(h, spare.rest, None), axis)
        if spare.order is not None:
            y = self.ops.take(y, spare.order, axis)
        return y if bias is None else self.ops.add(y, self.ops.reshape(bias, (spare.width, *unit(-1 - axis))))

    def _read(self, x: V, spare: _Spare, axis: int) -> tuple[V, V]:
        """`x_p, x_rest`."""
        ends = ((0, spare.r), (spare.r, spare.width))
        if spare.order is None:
            first, rest = (self.ops.part(x, axis, *pair) for pair in ends)
        else:
            first, rest = (self.ops.take(x, self.ops.part(spare.order, -1, *pair), axis) for pair in ends)
        return first, rest


def spared_formats(name: str, site: Site, rank: Rank) -> list[str]:
    """Formats that store what the named one stores at that rank in fewer numbers, those that need no order of channels first."""
    chain = FORMATS.get(name).chain.name
    lean = [
        fmt
        for ending in (LEAD, PIVOT)
        if chain + ending in FORMATS and isinstance(fmt := FORMATS.get(chain + ending), Pivoted)
    ]
    names = [fmt.name for fmt in lean if fmt.spares(site, rank)]
    return names[: names.index(name)] if name in names else names


def without_spare(names: Sequence[str], site: Site) -> tuple[str, ...]:
    """The formats, in place of each the one that spares what its factors hold twice where the site lets it."""
    lean = {
        name: name + PIVOT
        for name in names
        if name + PIVOT in FORMATS and FORMATS.get(name + PIVOT).fits(site)
    }
    return tuple(dict.fromkeys(lean.get(name, name) for name in names))


def reordered(layer: Layer, order: Tensor) -> Layer | None:
    """The layer where it reads inputs in another order, `x[order]`.

    None where no factor of its own holds them as they are.
    """
    chain = FORMATS.get(layer.format).chain
    if layer.form.encoded or not chain.reader:
        return None
    reads = next(
        (bond for bond in chain.bonds(layer.site) if not bond.writes and layer.format != chain.name), None
    )
    if reads is None:
        return replace(
            layer,
            factors={
                **layer.factors,
                chain.reader: layer.factors[chain.reader].index_select(1, order).contiguous(),
            },
        )
    held = layer.factors.get(_order(reads))
    if held is None:
        return None
    return replace(
        layer, factors={**layer.factors, _order(reads): order.argsort()[held.long()].to(held.dtype)}
    )


def led(layer: Layer, after: Layer, spread: int = 1) -> tuple[Layer, Layer] | None:
    """The layer with its pivots in the lead, and the one that alone reads what it makes, each channel `spread` times, with its inputs so.

    None where the layer, which is a pivoted one, has to put its inputs in an order too, or the other cannot
    take them in another.
    """
    orders = {name: value for name, value in layer.factors.items() if name.endswith(_ORDER)}
    bonds = {_order(bond): bond for bond in FORMATS.get(layer.format).chain.bonds(layer.site)}
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
    """Class decorator: make known, beside a format whose factors have bonds, the two without what they hold twice."""
    inner = cls()
    facts = {fact: getattr(inner, fact) for fact in _FACTS}
    for ending, ordered in ((PIVOT, True), (LEAD, False)):
        own = {
            "name": inner.name + ending,
            "inner": inner,
            "ordered": ordered,
            "__doc__": f"`{inner.name}` without what its factors hold twice.",
        }
        register_format(type(f"{cls.__name__}{ending}", (Pivoted,), {**facts, **own}))
    return cls
