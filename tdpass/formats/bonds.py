"""Bonds: axes that two factors share.

Of a factor the r x r numbers that it holds twice along a bond need not be stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpass.errors import NumericalError
from tdpass.formats.operands import Operand, Part
from tdpass.formats.pivots import BOUND, choose_pivots, leading_coefficients, order_of
from tdpass.site import Site

Shape = tuple[int, ...]
ORDER = "_order"
ORDER_TYPE = torch.int32
_LEADING, _CHOSEN = 4 * BOUND, 32 * BOUND
SINGULAR, _ROUNDING = 1e-10, 1e-9


@dataclass(frozen=True)
class Pieces:
    """What is stored of a factor, its channels' order where there is one, and `[r, r]` for its partner."""

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
        sizes = [1] * len(shape)
        sizes[1 if self.axis == 0 else 0] = count
        sizes[self.axis] = shape[self.axis]
        return tuple(sizes)

    def _matrix(self, factor: Tensor) -> Tensor:
        """The factor as `[n, r]`."""
        return factor.movedim(self.axis, -1).flatten(0, -2)

    def _shaped(self, matrix: Tensor, shape: Shape) -> Tensor:
        """The factor of that shape of a matrix `[n, r]`."""
        others = [size for axis, size in enumerate(shape) if axis != self.axis]
        moved = matrix.reshape(*others, matrix.shape[1]).movedim(-1, self.axis)
        return moved.clone(memory_format=torch.contiguous_format)  # canonical strides of axes of size 1 too


def check_pieces(coefficients: Tensor, left: Tensor, whole: Tensor, what: str, chosen: bool) -> None:
    """Raise `NumericalError` where coefficients are large, or what they leave of the whole is no rounding."""
    largest, limit = float(coefficients.abs().max()), _CHOSEN if chosen else _LEADING
    if not (largest <= limit and float(left.norm()) <= _ROUNDING * float(whole.norm())):
        raise NumericalError(f"the pivots do not make up {what} by coefficients up to {limit:g}")
