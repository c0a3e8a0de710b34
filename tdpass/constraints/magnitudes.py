"""The distribution of a weight's magnitudes, and the best interval of uniform levels.

It is small enough to try many sets of levels on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BINS = 4096
_FINE = 96
_CLIPPED = 10.0
_FOLLOWED = 8
_NEAR = 0.03
_STEPS = 30


@dataclass(frozen=True)
class Levels:
    """Magnitudes that a scale multiplies, ascending and positive; float64 on the CPU."""

    magnitudes: Tensor

    def index(self, values: Tensor) -> Tensor:
        """The place of the nearest magnitude of each value."""
        middles = (self.magnitudes[1:] + self.magnitudes[:-1]) / 2
        return torch.bucketize(values.contiguous(), middles.to(values))

    def nearest(self, values: Tensor) -> Tensor:
        """The magnitude nearest to each value."""
        return self.magnitudes.to(values)[self.index(values)]


class Multiples(Levels):
    """1, 2 .. `count`."""

    def __init__(self, count: int) -> None:
        super().__init__(torch.arange(1, count + 1).double())

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp_(1, len(self.magnitudes))


@dataclass(frozen=True)
class Magnitudes:
    """Number, sum and sum of squares of the magnitudes in each bin, zeros left out.

    Up to 4,096 weights have a bin each.  Float64 on the CPU.
    """

    number: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Magnitudes:
        """Those of a finite weight."""
        values = weight.detach().reshape(-1).abs()
        values = values[values > 0].double()
        if len(values) <= _BINS:
            values = values.cpu()
            return cls(torch.ones_like(values), values, values.square())
        place = (values * ((_BINS - 1) / values.max())).round_().long()
        number, total, squares = (
            torch.bincount(place, part, minlength=_BINS).double().cpu()
            for part in (None, values, values.square())
        )
        filled = number > 0
        return cls(number[filled], total[filled], squares[filled])

    @property
    def count(self) -> int:
        """Weights that are not zero."""
        return int(self.number.sum())

    @property
    def means(self) -> Tensor:
        """The mean magnitude of each bin."""
        return self.total / self.number

    def errors(self, nearest: Tensor) -> Tensor:
        """Squared error when the weights of bin b go to the magnitude `nearest[..., b]`."""
        return (self.squares - 2 * nearest * self.total + nearest.square() * self.number).sum(-1).clamp_min(0)

    def interval(self, levels: int) -> tuple[float, float]:
        """The interval q of the levels q, 2 q ...

        `levels` q of least squared error, and that error; (1, 0) where all weights are zero.
        """
        return self.scale(Multiples(levels))

    def scale(self, levels: Levels) -> tuple[float, float]:
        """The scale q of the levels `q a` of least squared error, and that error.

        (1, 0) where all weights are zero. A scan whose best places are followed by alternating between the
        nearest levels a and `q = sum a w / sum a^2`, then a finer scan about the best of these, as with many
        levels each place is a fixed point of its own.
        """
        if self.count == 0:
            return 1.0, 0.0
        top, largest = float(self.means.max()), float(levels.magnitudes[-1])
        # A weight that is on levels already has its largest on one of them.
        clipped = largest * torch.logspace(math.log10(0.9), math.log10(_CLIPPED), _FINE, dtype=torch.float64)
        q, error = self._followed(top / torch.cat([levels.magnitudes, clipped]), levels)
        finer, less = self._followed(
            q * torch.linspace(1 - _NEAR, 1 + _NEAR, _FINE, dtype=torch.float64), levels
        )
        return (finer, less) if less < error else (q, error)

    def _followed(self, q: Tensor, levels: Levels) -> tuple[float, float]:
        """The best scale that alternation reaches from the best of those given, and its error."""
        q = q[self._error(q, levels).argsort(stable=True)[:_FOLLOWED]]
        for _ in range(_STEPS):
            a = self._assigned(q, levels)
            following = (a * self.total).sum(1) / (a.square() * self.number).sum(1)
            if torch.equal(following, q):
                break
            q = following
        errors = self._error(q, levels)
        found = int(errors.argmin())
        return float(q[found]), float(errors[found])

    def _assigned(self, q: Tensor, levels: Levels) -> Tensor:
        return levels.nearest(self.means / q[:, None])

    def _error(self, q: Tensor, levels: Levels) -> Tensor:
        return torch.cat(
            [self.errors(part[:, None] * self._assigned(part, levels)) for part in torch.split(q, 16)]
        )


def rank_within(groups: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """For every element its place in its group, from 0, and the size of that group.

    Places go by ascending gap; of equal gaps the first comes first.
    """
    _, place, sizes = torch.unique(groups.reshape(-1), return_inverse=True, return_counts=True)
    order = gaps.reshape(-1).argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[place[order]]
    return rank.reshape(groups.shape), sizes[place].reshape(groups.shape)


def on_levels(weight: Tensor, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight with every magnitude but zero replaced by `nearest` of it, in the weight's type."""
    wide = weight.detach().to(torch.float32 if weight.dtype.itemsize < 4 else weight.dtype)
    return (wide.sign() * nearest(wide.abs())).to(weight.dtype)
