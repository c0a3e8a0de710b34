"""Bonds of cores of several modes, as those of trains and rings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpass.formats.bonds import SINGULAR, Bond, Pieces, Shape, check_pieces
from tdpass.formats.operands import Operand, Part, Sliced
from tdpass.site import Site

REST, SLICE = "_rest", "_slice"


@dataclass(frozen=True)
class CoreBond(Bond):
    """A bond of a core of several modes: the factor has it as its axis `at`, the partner as `partner_at`.

    All other axes of the factor are channels, of those `sizes`, -1 where that is a rank; what is stored of it
    has a name of its own.  Its product is repeated for `repeats` parts of what the site reads or makes, and
    for each place of the first axis of the core `per`.
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
    """A bond of a core `[r, o, ...]` whose product makes r times o.

    The first slice along `mode` holds the identity. Pivots are chosen in that slice alone, since only there
    they spare products.  What is left of it is stored as `SLICE`, all other slices under the core's own name.
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
        solved = rows @ torch.linalg.pinv(made.square, rtol=SINGULAR)
        check_pieces(solved, rows - solved @ made.square, factor, f"the slices of {self.factor}", ordered)
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
