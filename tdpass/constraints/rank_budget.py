"""Ranks of many layers from one budget, chosen by the spectra of their unfoldings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from tdpass.constraints.allocation import Numbers, Options, allocate
from tdpass.constraints.base import Constraint, Shared, checked
from tdpass.constraints.in_format import InFormat
from tdpass.constraints.spectral import SPECTRAL, energies
from tdpass.constraints.unconstrained import Unconstrained
from tdpass.cost import amount
from tdpass.errors import PlanError, UsageError
from tdpass.following import Progress, followed, silent
from tdpass.formats import FORMATS, Rank
from tdpass.formats.layer import dense_cost, shrinks
from tdpass.measures import counted
from tdpass.site import Site

_FINE = 128


class Price(Protocol):
    """What a layer costs at a rank; the dense layer where the rank is None."""

    def __call__(self, site: Site, rank: Rank | None) -> float: ...


@dataclass(frozen=True)
class RankBudget(Shared):
    """min sum_l s_l lost_l / ||V_l||^2 with sum_l price_l(rank_l) <= limit.

    The greedy of BATUDE (Yin et al. 2022), with dense layers. `lost` sums the squared singular values that
    the ranks cut off all unfoldings, less `shrink` each.  In a layer, the value that loses least per unit of
    cost saved is dropped next; over layers, the lower convex hulls of these paths and of the dense layer are
    walked by slope, as a layer that leaves dense may have to jump to the rank where factors are cheaper.
    `sensitivity` holds s where it is not 1.

    `format` is one name or one for each site; `cuts` the number of ranks of `tensor_train`; `price` a measure
    of `Cost` or a function; `dense` whether a layer may stay as it is; `least` the smallest rank.  Ranks
    already in use are given as `keep`: what they keep counts `hysteresis` times, what they cut off that much
    less, so that ranks settle.

    Raises `PlanError` where format, sites and weights do not fit each other, `BudgetError` naming the least
    reachable cost.
    """

    sites: Mapping[str, Site]
    format: str | Mapping[str, str]
    limit: float
    price: str | Price = "macs"
    dense: bool = True
    least: int = 1
    cuts: int | None = None
    keep: Mapping[str, Rank] = field(default_factory=dict)
    hysteresis: float = 1.25
    shrink: float = 0.0
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    progress: Progress = silent

    def __post_init__(self) -> None:
        if isinstance(self.price, str) and self.price not in counted():
            raise UsageError(
                f"unknown measure {self.price!r} of a rank budget; known: {', '.join(counted())}, or give a "
                "function of site and rank"
            )
        if self.least < 1 or self.hysteresis < 1 or self.shrink < 0:
            raise UsageError(
                f"least={self.least}, hysteresis={self.hysteresis}, shrink={self.shrink}; these are at "
                "least 1, 1 and 0"
            )
        wrong = {
            name: value
            for name, value in self.sensitivity.items()
            if name not in self.sites or not value >= 0
        }
        if wrong:
            raise UsageError(
                f"sensitivities {wrong} are not numbers of 0 or more of the sites {', '.join(self.sites)}"
            )
        for name, site in self.sites.items():
            self._check(name, site)

    def divide(self, weights: Mapping[str, Tensor]) -> dict[str, Constraint]:
        return self.allocated(self.options(weights))

    def allocated(self, options: Mapping[str, tuple[list[Rank], Options]]) -> dict[str, Constraint]:
        """The choice among `options` that the limit allows."""
        chosen = allocate({name: found for name, (_, found) in options.items()}, self.limit, self._text)
        return {name: self.constraint(name, options[name][0], k) for name, k in chosen.items()}

    def options(self, weights: Mapping[str, Tensor]) -> dict[str, tuple[list[Rank], Options]]:
        """The ranks that each weight may have, from large to small, and what these cost and lose.

        Last come the dense layer's cost and loss. Ranks at which a layer would grow in any measure are left
        out.
        """
        if set(weights) != set(self.sites):
            odd = sorted(set(weights) ^ set(self.sites))
            raise PlanError(
                f"weights and sites of a rank budget differ in {', '.join(odd)}; give one weight for each "
                "site"
            )
        every = followed("choosing ranks", weights.items(), self.progress)
        return {name: self._options(name, weight) for name, weight in every}

    def constraint(self, name: str, ranks: Sequence[Rank], k: int) -> Constraint:
        """What choosing option k of `options` makes of a weight."""
        return (
            InFormat(self.sites[name], self.format_of(name), ranks[k]) if k < len(ranks) else Unconstrained()
        )

    def format_of(self, name: str) -> str:
        """The format of a site."""
        return self.format if isinstance(self.format, str) else self.format.get(name, "")

    def cost_of(self, name: str, rank: Rank | None) -> float:
        """What a site costs at a rank, or dense for None."""
        site = self.sites[name]
        if not isinstance(self.price, str):
            return float(self.price(site, rank))
        return (dense_cost(site) if rank is None else FORMATS.get(self.format_of(name)).cost(site, rank)).get(
            self.price
        )

    def _check(self, name: str, site: Site) -> None:
        form = self.format_of(name)
        if form not in SPECTRAL:
            raise PlanError(
                f"format {form!r} of site {name!r} has no spectrum to choose ranks by; these have: "
                f"{', '.join(sorted(SPECTRAL))}"
            )
        InFormat(site, form, (1,) * SPECTRAL[form].ranks(site, self.cuts))
        if self.price == "macs" and not site.seen:
            raise PlanError(
                f"site {name!r} has no activation sizes, so its multiply-adds are unknown; run the model "
                "once, or give the budget in params"
            )

    def _options(self, name: str, weight: Tensor) -> tuple[list[Rank], Options]:
        site = self.sites[name]
        tails = self._tails(name, weight)
        path = self._path(name, tails)
        ranks, costs, losses = [list(column) for column in zip(*path, strict=True)]
        if self.dense:
            whole = self.cost_of(name, None)
            cheap = [
                k
                for k, cost in enumerate(costs)
                if cost < whole and shrinks(site, self.format_of(name), ranks[k])
            ]
            ranks = [ranks[k] for k in cheap]
            return ranks, Options(
                np.array([*(costs[k] for k in cheap), whole]), np.array([*(losses[k] for k in cheap), 0.0])
            )
        return ranks, Options(np.array(costs), np.array(losses))

    def _tails(self, name: str, weight: Tensor) -> list[Numbers]:
        """`tails[k][r]`: the share of the energy that rank r cuts off unfolding k."""
        site = self.sites[name]
        if tuple(weight.shape) != site.shape:
            raise PlanError(
                f"site {name!r} has shape {site.shape}, the weight {tuple(weight.shape)}; make the budget "
                "from this model"
            )
        way, before = SPECTRAL[self.format_of(name)], self.keep.get(name)
        count = way.ranks(site, self.cuts)
        if before is not None and len(before) != count:
            raise PlanError(
                f"rank {before} to keep at site {name!r} has {len(before)} numbers; its format has {count}"
            )
        tails = []
        for k, unfolding in enumerate(way.unfoldings(checked(weight), site, count)):
            energy: Numbers = energies(unfolding).numpy()
            lost = (
                self.sensitivity.get(name, 1.0)
                * np.square(np.maximum(np.sqrt(energy) - self.shrink, 0))
                / (float(energy.sum()) or 1.0)
            )
            if before is not None:
                lost = np.where(
                    np.arange(len(lost)) < before[k], lost * self.hysteresis, lost / self.hysteresis
                )
            tails.append(np.append(lost[::-1].cumsum()[::-1], 0.0))
        return tails

    def _path(self, name: str, tails: list[Numbers]) -> list[tuple[Rank, float, float]]:
        """(rank, cost, loss) from full ranks to the least ones.

        Each step lowers the rank that loses least per unit of cost saved.
        """
        site, way = self.sites[name], SPECTRAL[self.format_of(name)]

        def point(rank: Rank) -> tuple[Rank, float, float]:
            rank = way.useful(site, rank)
            return (
                rank,
                self.cost_of(name, rank),
                sum(float(tail[r]) for tail, r in zip(tails, rank, strict=True)),
            )

        path = [point(tuple(len(tail) - 1 for tail in tails))]
        while True:
            rank, cost, loss = path[-1]
            trials = []
            for k, r in enumerate(rank):
                # all ranks up to 128 are tried, above only steps of less than one in a hundred
                lower = max(min(self.least, r), r - 1 - r // _FINE)
                if lower < r:
                    after = point((*rank[:k], lower, *rank[k + 1 :]))
                    saved, more = cost - after[1], after[2] - loss
                    # a measured cost may not fall with the rank
                    trials.append((more / saved if saved > 0 else np.inf, more, after))
            if not trials:
                return path
            path.append(min(trials)[2])

    def _text(self, value: float) -> str:
        return f"{amount(self.price, value)} {self.price}" if isinstance(self.price, str) else f"{value:.4g}"
