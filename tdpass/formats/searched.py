"""Decompositions that are searched for.

Least squares of the whitened weight, then least error in the metric.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.alternating import ANEW, GOING_ON, ROUGH, Limit, State
from tdpass.formats.base import Decomposition, Factors
from tdpass.formats.metric import Metric
from tdpass.formats.multilinear import Modes, Whitened, Whitening, best_polished, polished


class Fit(Whitened, Protocol):
    """Alternating least squares for one whitened weight."""

    def start(self, rank: Rank) -> State:
        """Where a search at that rank begins."""

    def search(self, start: State, limit: Limit = ANEW) -> State:
        """Whitened factors found from such."""


class Searched(Decomposition):
    """Factors of least error, from the better of two starts.

    The best for the plain norm, and for the whitened weight. A `rough` search begins from the latter alone.
    Subclasses say what the factors of a state multiply out to, how they are stored, and what `polish` has to
    go through.
    """

    def __init__(self, weight: Tensor, metric: Metric, modes: Modes, fit: Callable[[Whitening], Fit]) -> None:
        self.matrix, self.metric = weight.flatten(1), metric
        self.fits = [fit(whitening) for whitening in Whitening.starts(metric, modes)]

    @abstractmethod
    def unfolded(self, state: State) -> Tensor:
        """The `o x (i h w)` matrix of factors, linear in each."""

    @abstractmethod
    def macs(self, rank: Rank) -> int:
        """Multiply-adds of `unfolded`."""

    @abstractmethod
    def order(self) -> Sequence[int]:
        """The places of the factors that are polished, in turn."""

    @abstractmethod
    def stored(self, rank: Rank, state: State) -> Factors:
        """Factors as the format stores them."""

    @abstractmethod
    def loaded(self, factors: Factors) -> State:
        """What `stored` was given, up to norms shared out among factors."""

    def solved(self, state: State) -> State:
        """The state with a factor that is best for the others, where one is left to be solved."""
        return state

    def factors(self, rank: Rank) -> Factors:
        limit = ROUGH if self.rough else ANEW
        fits = self.fits[-1:] if self.rough else self.fits
        states = [fit.search(fit.start(rank), limit) for fit in fits]
        if self.metric.plain:
            return self.stored(rank, states[0])
        state = best_polished(
            self.matrix, fits, states, self.unfolded, self.metric, self.order(), self.macs(rank), limit.work
        )
        return self.stored(rank, self.solved(state))

    def refined(self, rank: Rank, factors: Factors) -> Factors:
        given = self.loaded(factors)
        if self.metric.plain:
            return self.stored(rank, self.fits[0].search(given, limit=GOING_ON))
        return self.stored(rank, polished(self.matrix, given, self.unfolded, self.metric, self.macs(rank)))
