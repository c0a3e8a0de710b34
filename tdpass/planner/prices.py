"""Prices: what the sites' candidates cost on a target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tdpass.cost import Budget, Cost
from tdpass.form import DENSE, Form, Rank
from tdpass.planner.candidates import Candidate, dense_candidate
from tdpass.site import Site
from tdpass.targets.base import Setting, Target


class Prices(Protocol):
    """What planning asks of a target; candidates and sites are those of one model."""

    @property
    def target(self) -> Target:
        """The target."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Those by which a candidate must be cheaper than the dense layer to be of use.

        Reasons give the first.
        """

    def setting(self, site: Site) -> Setting:
        """How that site's layer is called."""

    def scan(self, site: Site, candidates: Sequence[Candidate]) -> None:
        """Get to know what the dense layer and these candidates cost, as far as is needed to judge them."""

    def scale_to(self, whole: Cost, sites: Sequence[Site]) -> str:
        """Bring the layers' prices into line with that of the whole model.

        Says what was done, empty for nothing.
        """

    def priced(self, site: Site, candidate: Candidate) -> Candidate:
        """The candidate with its amounts on the target in its cost, and the runtime that they are of."""

    def pays(self, site: Site, candidate: Candidate) -> bool:
        """Whether a priced candidate is clearly cheaper than the dense layer."""

    def confirm_all(self, wanted: Iterable[tuple[Site, Form]]) -> bool:
        """Make sure of these prices; returns whether any had to be found out anew."""

    def sure(self, site: Site, form: Form) -> bool:
        """Whether a price is final."""

    def predicted(self, site: Site, form: Form) -> float:
        """Seconds that were expected before the price was final."""

    def break_even(self, site: Site, format_name: str) -> Rank | None:
        """The largest known rank of a format that is cheaper than dense."""


def deciding(target: Target, budget: Budget | None) -> tuple[str, ...]:
    """The measures that decide on a target what pays.

    Those that the budget bounds, else what the target names first.
    """
    bounded = (
        () if budget is None else tuple(measure for measure in target.measures if measure in budget.measures)
    )
    return bounded or target.measures[:1]


@dataclass
class PriceList:
    """Prices on a modelled target: every candidate's is exact, and none has to be found out twice."""

    target: Target
    measures: tuple[str, ...]
    batch: int
    _known: dict[Site, dict[Form, Cost]] = field(default_factory=dict)

    def setting(self, site: Site) -> Setting:
        return Setting(self.batch)

    def scan(self, site: Site, candidates: Sequence[Candidate]) -> None:
        for candidate in (dense_candidate(site), *candidates):
            self._cost(site, candidate.form)

    def scale_to(self, whole: Cost, sites: Sequence[Site]) -> str:
        return ""

    def priced(self, site: Site, candidate: Candidate) -> Candidate:
        return replace(candidate, cost=self._cost(site, candidate.form).recounted(candidate.cost))

    def pays(self, site: Site, candidate: Candidate) -> bool:
        dense = self._cost(site, DENSE)
        return all(candidate.cost.get(measure) < dense.get(measure) for measure in self.measures)

    def confirm_all(self, wanted: Iterable[tuple[Site, Form]]) -> bool:
        return False

    def sure(self, site: Site, form: Form) -> bool:
        return True

    def predicted(self, site: Site, form: Form) -> float:
        return self._cost(site, form).seconds

    def break_even(self, site: Site, format_name: str) -> Rank | None:
        return self.target.break_even(site, format_name, self.setting(site))

    def _cost(self, site: Site, form: Form) -> Cost:
        known = self._known.setdefault(replace(site, name=""), {})
        if form not in known:
            (known[form],) = self.target.cost(site, [form], self.setting(site))
        return known[form]
