"""The forms that a search may choose for a site, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tdpass.form import DENSE, Form, Rank
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import shrinks
from tdpass.methods.tariff import Tariff
from tdpass.site import Site


@dataclass(frozen=True)
class Menu:
    """Forms of one site, dense first, with the amount that each costs."""

    forms: tuple[Form, ...]
    costs: tuple[float, ...]

    def with_cost(self, k: int, cost: float) -> Menu:
        """The same with another amount for form k."""
        return replace(self, costs=(*self.costs[:k], cost, *self.costs[k + 1 :]))

    @classmethod
    def of(cls, site: Site, formats: Sequence[str], ranks: int, tariff: Tariff) -> Menu:
        """Up to `ranks` ranks of each format that fits, evenly over their cost, all cheaper than dense.

        On a target they are the ones that leave nothing of the machine idle, the edges of its staircase.
        """
        (dense,) = tariff.amounts(site, [DENSE])
        found = [(DENSE, dense)]
        limit = dense * (1 - (0.0 if tariff.target is None else tariff.target.margin))
        for name in formats:
            if FORMATS.get(name).fits(site):
                forms = [Form(name, rank) for rank in _thinned(site, name, _ranks(site, name, tariff), ranks)]
                found += [
                    (form, cost)
                    for form, cost in zip(forms, tariff.amounts(site, forms), strict=True)
                    if cost < limit
                ]
        return cls(tuple(form for form, _ in found), tuple(cost for _, cost in found))


def _ranks(site: Site, format_name: str, tariff: Tariff) -> list[Rank]:
    """The ranks at which a layer is smaller than dense, cheap to expensive."""
    ranks = list(FORMATS.get(format_name).ranks(site))
    if tariff.target is not None:
        ranks = tariff.target.filling(site, format_name, ranks)
    return [rank for rank in ranks if shrinks(site, format_name, rank)]


def _thinned(site: Site, format_name: str, ranks: Sequence[Rank], count: int) -> list[Rank]:
    """Up to `count` of these, those nearest to even steps of their number of weights."""
    if len(ranks) <= count:
        return list(ranks)
    sizes = np.array([FORMATS.get(format_name).cost(site, rank).params for rank in ranks], dtype=float)
    steps = np.linspace(sizes.min(), sizes.max(), count)
    return [ranks[k] for k in sorted({int(np.abs(sizes - step).argmin()) for step in steps})]
