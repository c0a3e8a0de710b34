"""The bond of a convolution that ends in a layer of several taps, as `spatial_svd` does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpass.formats.bonds import SINGULAR, Bond, Pieces, Shape, check_pieces
from tdpass.formats.operands import Operand, Tapped
from tdpass.formats.pivots import choose_blocks, order_of
from tdpass.kinds import kind_of
from tdpass.site import Site

OWN = "_own"
_MOST_TAPS = 5  # with more, blocks of pivots seldom make up the others by small coefficients


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
        inverse = torch.linalg.pinv(chosen, rtol=SINGULAR)
        solved = rows[order[q:]].flatten(0, 1) @ inverse
        beyond = rows.flatten(0, 1) @ (torch.eye(r, dtype=rows.dtype) - inverse @ chosen)
        beside = torch.linalg.svd(beyond)[2][: r - q * count]
        check_pieces(
            solved, beyond - beyond @ beside.T @ beside, rows, f"the outputs of {self.factor}", ordered
        )
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
