"""Bonds: axes that two factors share, and how a factor is stored without the r x r numbers that it holds twice along one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpass.errors import NumericalError
from tdpass.formats.operands import Operand, Part, Sliced, Tapped
from tdpass.formats.pivots import BOUND, choose_blocks, choose_pivots, leading_coefficients, order_of
from tdpass.kinds import kind_of
from tdpass.site import Site

Shape = tuple[int, ...]
ORDER, REST, SLICE, OWN = "_order", "_rest", "_slice", "_own"
_LEADING, _CHOSEN = 4 * BOUND, 32 * BOUND
_SINGULAR, _ROUNDING = 1e-10, 1e-9
_MOST_TAPS = 5  # with more, blocks of pivots seldom make up the others by small coefficients


@dataclass(frozen=True)
class Pieces:
    """What is stored of a factor, the order of its channels where there is one, and `[r, r]` for its partner."""

    factors: Mapping[str, Tensor]
    order: Tensor | None
    square: Tensor


@dataclass(frozen=True)
class Bond:
    """An axis of r that two factors share, between which any invertible r x r matrix may be put.

    `factor` is a linear layer or 1x1 convolution that writes the site's output (`writes`), or reads its
    input; `partner` is the factor before, or after it.
    """

    factor: str
    partner: str
    writes: bool

    @property
    def axis(self) -> int:
        """Where the factor has it."""
        return 1 if self.writes else 0

    @property
    def partner_axis(self) -> int:
        """Where the partner has it."""
        return 0 if self.writes else 1

    @property
    def name(self) -> str:
        """What of the factor is stored is called so."""
        return self.factor

    @property
    def order(self) -> str:
        """The name of the order of its channels."""
        return self.factor + ORDER

    def channels(self, shape: Shape) -> int:
        """n, the channels on the other side of a factor of that shape."""
        return math.prod(shape) // shape[self.axis]

    def ordered(self, shape: Shape) -> int:
        """How many places the order of a factor of that shape has."""
        return self.channels(shape)

    def spares(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether whole factors of those shapes hold anything twice along it."""
        shape = shapes.get(self.factor)
        return shape is not None and shape[self.axis] < self.channels(shape)

    def spared(self, stored: Mapping[str, Shape], site: Site) -> bool:
        """Whether stored factors of those shapes are without that."""
        partner = stored.get(self.partner)
        return partner is not None and partner[self.partner_axis] < (site.o if self.writes else site.i)

    def stored(self, shape: Shape) -> dict[str, Shape]:
        """What a factor of that shape is stored as."""
        return {self.name: self._of(shape, self.channels(shape) - shape[self.axis])}

    def pivot(self, factor: Tensor, *, ordered: bool) -> Pieces:
        """Its pieces.

        `ordered` says that pivots are chosen, else they are the leading channels.  Raises `NumericalError`
        where these do not make up the others by small coefficients.
        """
        matrix = self._matrix(factor)
        n, r = matrix.shape
        pivots, coefficients = (
            choose_pivots(matrix) if ordered else (torch.arange(r), leading_coefficients(matrix))
        )
        order = order_of(pivots, n) if ordered else None
        piece = self._shaped(coefficients, self._of(tuple(factor.shape), n - r))
        return Pieces({self.name: piece}, self._kept(order), matrix[pivots])

    def whole(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The factor of its pieces."""
        rest = stored[self.name]
        coefficients = self._matrix(rest)
        eye = torch.eye(coefficients.shape[1], dtype=rest.dtype, device=rest.device)
        matrix = self._in_place(torch.cat([eye, coefficients]), stored)
        return self._shaped(matrix, self._like(tuple(rest.shape), len(matrix)))

    def uses(self, site: Site, shapes: Mapping[str, Shape]) -> int:
        """Multiply-adds that each number of the factor takes part in, where the factors have those shapes."""
        return site.out_positions if self.writes else site.in_positions

    def _like(self, shape: Shape, count: int) -> Shape:
        """The shape of the factor of which a piece of that shape is left, and its n."""
        return self._of(shape, count)

    def absorbed(self, partner: Tensor, square: Tensor) -> Tensor:
        """The partner with `square[r, r]` of the factor put into it."""
        product: Tensor = torch.tensordot(square, partner, dims=([1], [self.partner_axis]))
        return product.movedim(0, self.partner_axis).contiguous()

    def operand(self, values: Mapping[str, Any], shape: Shape) -> Operand:
        """The factor of that shape as products take it."""
        r, n = shape[self.axis], self.channels(shape)
        return Part(values[self.name], values.get(self.order), self.writes, r, n)

    def _kept(self, order: Tensor | None) -> Tensor | None:
        """The order as products use it: of what is written back to its place, of what is read from it."""
        return None if order is None else (order.argsort() if self.writes else order).int()

    def _in_place(self, matrix: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        held = stored.get(self.order)
        if held is None:
            return matrix
        return matrix[held.long() if self.writes else held.long().argsort()]

    def _of(self, shape: Shape, count: int) -> Shape:
        """A shape whose axes but that of the bond hold so many channels, all along the first of them."""
        first = 1 if self.axis == 0 else 0
        return tuple(
            size if axis == self.axis else count if axis == first else 1 for axis, size in enumerate(shape)
        )

    def _matrix(self, factor: Tensor) -> Tensor:
        """The factor as `[n, r]`."""
        return factor.movedim(self.axis, -1).flatten(0, -2)

    def _shaped(self, matrix: Tensor, shape: Shape) -> Tensor:
        """The factor of that shape of a matrix `[n, r]`."""
        others = [size for axis, size in enumerate(shape) if axis != self.axis]
        moved = matrix.reshape(*others, matrix.shape[1]).movedim(-1, self.axis)
        return moved.clone(memory_format=torch.contiguous_format)  # canonical strides of axes of size 1 too


@dataclass(frozen=True)
class CoreBond(Bond):
    """A bond of a core of several modes: the factor has it as its axis `at`, the partner as `partner_at`.

    All other axes of the factor are channels, of those `sizes`, -1 where that is a rank; what is stored of it
    has a name of its own.  Its product is repeated for `repeats` parts of what the site reads or makes, and for
    each place of the first axis of the core `per`.
    """

    at: int
    partner_at: int
    sizes: Shape
    repeats: int = 1
    per: str = ""

    @property
    def axis(self) -> int:
        return self.at

    @property
    def partner_axis(self) -> int:
        return self.partner_at

    @property
    def name(self) -> str:
        return self.factor + REST

    def spared(self, stored: Mapping[str, Shape], site: Site) -> bool:
        return self.name in stored

    def uses(self, site: Site, shapes: Mapping[str, Shape]) -> int:
        return self.repeats * (shapes[self.per][0] if self.per else 1) * super().uses(site, shapes)

    def _like(self, shape: Shape, count: int) -> Shape:
        return self.sizes

    def part(self, values: Mapping[str, Any], shape: Shape) -> Part:
        """The operand of a core of that shape."""
        r, n = shape[self.axis], self.channels(shape)
        sides = (r, n - r) if self.axis == 0 else (n - r, r)
        return Part(values[self.name], values.get(self.order), self.writes, r, n, sides)

    def operand(self, values: Mapping[str, Any], shape: Shape) -> Operand:
        return self.part(values, shape)


@dataclass(frozen=True)
class SliceBond(CoreBond):
    """A bond of a core `[r, o, ...]` whose product makes r times o: the first slice along `mode` holds the identity.

    Pivots are chosen in that slice alone, since only there they spare products.  What is left of it is stored
    as `SLICE`, all other slices under the core's own name.
    """

    mode: int = 0

    @property
    def name(self) -> str:
        return self.factor + SLICE

    def _inner(self, shape: Shape) -> CoreBond:
        """The bond of the slice of a core of that shape."""
        at = self.at - (self.mode < self.at)
        return CoreBond(self.factor, self.partner, self.writes, at, self.partner_at, self._slice(shape))

    def _slice(self, shape: Shape) -> Shape:
        return (*shape[: self.mode], *shape[self.mode + 1 :])

    def spares(self, shapes: Mapping[str, Shape]) -> bool:
        shape = shapes.get(self.factor)
        if shape is None or shape[self.mode] < 2:
            return False
        return self._inner(shape).spares({self.factor: self._slice(shape)})

    def ordered(self, shape: Shape) -> int:
        return math.prod(self._slice(shape)) // shape[self.at]

    def stored(self, shape: Shape) -> dict[str, Shape]:
        (piece,) = self._inner(shape).stored(self._slice(shape)).values()
        rest = (*shape[: self.mode], shape[self.mode] - 1, *shape[self.mode + 1 :])
        return {self.name: piece, self.factor: rest}

    def pivot(self, factor: Tensor, *, ordered: bool) -> Pieces:
        made = self._inner(tuple(factor.shape)).pivot(factor.select(self.mode, 0), ordered=ordered)
        others = factor.narrow(self.mode, 1, factor.shape[self.mode] - 1)
        flat = others.movedim(self.at, -1)
        rows = flat.flatten(0, -2)
        solved = rows @ torch.linalg.pinv(made.square, rtol=_SINGULAR)
        _check(solved, rows - solved @ made.square, factor, f"the slices of {self.factor}", ordered)
        rest = solved.reshape(flat.shape)
        (piece,) = made.factors.values()
        return Pieces(
            {
                self.name: piece,
                self.factor: rest.movedim(-1, self.at).clone(memory_format=torch.contiguous_format),
            },
            made.order,
            made.square,
        )

    def whole(self, stored: Mapping[str, Tensor]) -> Tensor:
        rest = stored[self.factor]
        inner = self._inner(tuple(rest.shape))
        first = inner.whole({**stored, inner.name: stored[self.name]})
        return torch.cat([first.unsqueeze(self.mode), rest], self.mode)

    def operand(self, values: Mapping[str, Any], shape: Shape) -> Operand:
        inner = self._inner(shape)
        first = inner.part({**values, inner.name: values[self.name]}, self._slice(shape))
        return Sliced(first, values[self.factor], shape[self.mode])


@dataclass(frozen=True)
class TapBond(Bond):
    """The bond of a convolution whose last layer has several taps: `last[o, r, *taps]` after `first[r, ...]`.

    With all taps of q outputs as pivots, q = r // taps, these outputs add up their own features, one at each
    tap, and all others read everything: `taps q (r - taps)` numbers fewer.  The sum is a grouped convolution
    of ones, stored as `OWN`.
    """

    def ordered(self, shape: Shape) -> int:
        return shape[0]

    def _pivots(self, shape: Shape) -> int:
        return shape[1] // math.prod(shape[2:])

    def spares(self, shapes: Mapping[str, Shape]) -> bool:
        shape = shapes.get(self.factor)
        if shape is None:
            return False
        taps = math.prod(shape[2:])
        return taps <= _MOST_TAPS and 0 < self._pivots(shape) < shape[0] and shape[1] > taps

    def spared(self, stored: Mapping[str, Shape], site: Site) -> bool:
        return self.factor + OWN in stored

    def stored(self, shape: Shape) -> dict[str, Shape]:
        q, taps = self._pivots(shape), shape[2:]
        return {self.factor: (shape[0] - q, *shape[1:]), self.factor + OWN: (q, math.prod(taps), *taps)}

    def pivot(self, factor: Tensor, *, ordered: bool) -> Pieces:
        outputs, r, *taps = factor.shape
        count = math.prod(taps)
        q = r // count
        rows = factor.flatten(2).transpose(1, 2)
        blocks = choose_blocks(rows, q) if ordered else torch.arange(q)
        order = order_of(blocks, outputs)
        chosen = rows[blocks].flatten(0, 1)
        inverse = torch.linalg.pinv(chosen, rtol=_SINGULAR)
        solved = rows[order[q:]].flatten(0, 1) @ inverse
        beyond = rows.flatten(0, 1) @ (torch.eye(r, dtype=rows.dtype) - inverse @ chosen)
        beside = torch.linalg.svd(beyond)[2][: r - q * count]
        _check(solved, beyond - beyond @ beside.T @ beside, rows, f"the outputs of {self.factor}", ordered)
        others = torch.cat([solved, rows[order[q:]].flatten(0, 1) @ beside.T], 1)
        rest = others.reshape(outputs - q, count, r).transpose(1, 2).reshape(outputs - q, r, *taps)
        own = torch.eye(count, dtype=factor.dtype).expand(q, -1, -1).reshape(q, count, *taps)
        return Pieces(
            {self.factor: rest.contiguous(), self.factor + OWN: own.contiguous()},
            order.argsort().int() if ordered else None,
            torch.cat([chosen, beside]),
        )

    def uses(self, site: Site, shapes: Mapping[str, Shape]) -> int:
        return kind_of(site).positions(site, range(1, site.axes))

    def whole(self, stored: Mapping[str, Tensor]) -> Tensor:
        rest, own = stored[self.factor], stored[self.factor + OWN]
        q, count = own.shape[:2]
        first = rest.new_zeros(q, *rest.shape[1:])
        for place in range(q):
            first[place, place * count : (place + 1) * count] = own[place]
        return self._in_place(torch.cat([first, rest]), stored)

    def operand(self, values: Mapping[str, Any], shape: Shape) -> Operand:
        own, q = values[self.factor + OWN], self._pivots(shape)
        return Tapped(own, values[self.factor], values.get(self.order), q, math.prod(shape[2:]), shape[0])


def _check(coefficients: Tensor, left: Tensor, whole: Tensor, what: str, chosen: bool) -> None:
    """Raise `NumericalError` where coefficients are large, or what they leave of the whole is no rounding."""
    largest, limit = float(coefficients.abs().max()), _CHOSEN if chosen else _LEADING
    if not (largest <= limit and float(left.norm()) <= _ROUNDING * float(whole.norm())):
        raise NumericalError(f"the pivots do not make up {what} by coefficients up to {limit:g}")
