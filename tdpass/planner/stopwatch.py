"""Times of the sites' candidates on a target: measured at some ranks, interpolated between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from tdpass.cost import Budget, Cost, amount
from tdpass.form import DENSE, Form, Rank
from tdpass.formats.layer import cost_of
from tdpass.planner.candidates import Candidate
from tdpass.planner.prices import PriceList, Prices, deciding
from tdpass.site import Site
from tdpass.targets.base import Setting, Target, TimedTarget, Timing

RANKS_MEASURED = 6
_GRIDS = (16, 8)
_NOTHING = Timing(0.0)


@dataclass
class Stopwatch:
    """What a target says of a model's sites, called with that many samples and threads.

    `dtypes` holds the type of each site's weight.  `scale` is by how much layers are faster inside the model
    than alone: where their times add up to more than the whole takes, it makes them add up to just that.
    """

    target: TimedTarget
    batch: int
    threads: int
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    scale: float = 1.0
    measures: tuple[str, ...] = ("seconds",)
    _times: dict[Site, dict[Form, Timing]] = field(default_factory=dict)
    _careful: set[tuple[Site, Form]] = field(default_factory=set)
    _predicted: dict[tuple[Site, Form], float] = field(default_factory=dict)

    def setting(self, site: Site) -> Setting:
        """How that site's layer is called."""
        return Setting(self.batch, self.threads, self.dtypes.get(site.name, torch.float32))

    def scan(self, site: Site, candidates: Sequence[Candidate]) -> None:
        """Measure the dense layer and, of every format among the candidates, a few ranks."""
        forms = [DENSE, *anchors(candidates)]
        known = self._times.setdefault(_nameless(site), {})
        missing = [form for form in forms if form not in known]
        if missing:
            known.update(zip(missing, self.target.time(site, missing, self.setting(site)), strict=True))

    def confirm_all(self, wanted: Iterable[tuple[Site, Form]]) -> bool:
        """Measure with care what was not yet; returns whether there was anything."""
        missing: dict[Site, tuple[Site, list[Form]]] = {}
        for site, form in dict.fromkeys(wanted):
            if not self.sure(site, form):
                forms = missing.setdefault(_nameless(site), (site, []))[1]
                forms.extend(() if form in forms else (form,))
        for key, (site, forms) in missing.items():
            for form in forms:
                self._predicted[key, form] = self._of(site, form).seconds
            self._times[key].update(
                zip(forms, self.target.time(site, forms, self.setting(site), careful=True), strict=True)
            )
            self._careful.update((key, form) for form in forms)
        return bool(missing)

    def sure(self, site: Site, form: Form) -> bool:
        """Whether it was measured with care; what computes nothing takes nothing."""
        return (_nameless(site), form) in self._careful or _macs(site, form) == 0

    def predicted(self, site: Site, form: Form) -> float:
        """What was expected of it before it was measured with care."""
        return self._predicted.get((_nameless(site), form), 0.0) * self.scale

    def scale_to(self, whole: Cost, sites: Sequence[Site]) -> str:
        layers = sum(self.dense(site).seconds for site in sites)
        if layers <= whole.seconds:
            return ""
        self.scale = whole.seconds / layers
        alone, together = amount("seconds", layers), amount("seconds", whole.seconds)
        return (
            f"layers alone take {alone}, the whole model {together}: their times are scaled by "
            f"{self.scale:.2f}"
        )

    def priced(self, site: Site, candidate: Candidate) -> Candidate:
        timing = self.timing(site, candidate)
        return replace(candidate, cost=candidate.cost.replace(seconds=timing.seconds), kernel=timing.kernel)

    def pays(self, site: Site, candidate: Candidate) -> bool:
        return self.faster(site, candidate.cost.seconds)

    def dense(self, site: Site) -> Timing:
        """Time of the dense layer."""
        return self._scaled(self._times[_nameless(site)][DENSE])

    def timing(self, site: Site, candidate: Candidate) -> Timing:
        """Time of a candidate: as measured, else interpolated.

        It is then on the straight line between its format's nearest measured multiply-adds.
        """
        return self._scaled(self._of(site, candidate.form))

    def faster(self, site: Site, seconds: float) -> bool:
        """Whether that is clearly less than the dense layer takes."""
        return seconds < self.dense(site).seconds * (1 - self.target.margin)

    def break_even(self, site: Site, format_name: str) -> Rank | None:
        """The largest measured rank of a format that is faster than dense."""
        known = {
            form: timing
            for form, timing in self._times[_nameless(site)].items()
            if form.format == format_name and not form.narrow
        }
        found = [form for form, timing in known.items() if self.faster(site, self._scaled(timing).seconds)]
        return max(found, key=lambda form: _macs(site, form)).rank if found else None

    def _scaled(self, timing: Timing) -> Timing:
        return replace(timing, seconds=timing.seconds * self.scale)

    def _of(self, site: Site, form: Form) -> Timing:
        known = self._times[_nameless(site)]
        if form in known:
            return known[form]
        macs = _macs(site, form)
        if macs == 0:
            return _NOTHING
        like = {
            other: timing
            for other, timing in known.items()
            if (other.format, other.narrow) == (form.format, form.narrow)
        }
        points = sorted((_macs(site, other), timing.seconds, timing.kernel) for other, timing in like.items())
        finite = [point for point in points if math.isfinite(point[1])]
        return _between(finite, macs) if finite else Timing(math.inf)


def prices_on(
    target: Target, budget: Budget, batch: int, threads: int, dtypes: Mapping[str, torch.dtype]
) -> Prices:
    """Prices on a target, timed or computed."""
    if isinstance(target, TimedTarget):
        return Stopwatch(target, batch, threads, dtypes)
    return PriceList(target, deciding(target, budget), batch)


def anchors(candidates: Sequence[Candidate]) -> list[Form]:
    """The ranks to measure: of every format a handful from the cheapest to the dearest.

    They are on a grid of 16 or 8 channels where it has such. Vector units work on that many channels at once:
    a rank between two such takes the time of the larger.
    """
    found: list[Form] = []
    for key in dict.fromkeys((candidate.format, candidate.form.narrow) for candidate in candidates):
        group = [c for c in candidates if (c.format, c.form.narrow) == key and c.cost.macs > 0]
        forms = {
            c.form.sizes: replace(c.form, numbers=(), support="")
            for c in sorted(group, key=lambda c: (c.cost.macs, c.form.sizes))
        }
        ranks = list(forms)
        inner = next(
            (
                on
                for grid in _GRIDS
                if len(on := [rank for rank in ranks if all(r % grid == 0 for r in rank)])
                >= RANKS_MEASURED - 2
            ),
            ranks,
        )
        count = min(len(inner), RANKS_MEASURED - 2)
        spread = [inner[round(k * (len(inner) - 1) / max(count - 1, 1))] for k in range(count)]
        found += [forms[rank] for rank in dict.fromkeys([*ranks[:1], *spread, *ranks[-1:]])]
    return found


def _between(points: Sequence[tuple[int, float, str]], macs: int) -> Timing:
    """On the line between the neighbours; beyond the ends, in proportion to the multiply-adds of the last."""
    below = [point for point in points if point[0] <= macs]
    above = [point for point in points if point[0] > macs]
    if below and above:
        (m0, s0, kernel0), (m1, s1, kernel1) = below[-1], above[0]
        share = (macs - m0) / (m1 - m0)
        return Timing((1 - share) * s0 + share * s1, kernel0 if share < 0.5 else kernel1)
    m, seconds, kernel = below[-1] if below else above[0]
    return Timing(seconds * max(1.0, macs / m), kernel)


def _macs(site: Site, form: Form) -> int:
    return cost_of(site, form).macs


def _nameless(site: Site) -> Site:
    return replace(site, name="")
