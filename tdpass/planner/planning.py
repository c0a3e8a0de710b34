"""Planning: candidates of every site, their losses, and options that change several sites together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tdpass.digest import digest
from tdpass.errors import NumericalError
from tdpass.following import Progress, silent
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, offered_formats
from tdpass.formats.metric import Metric
from tdpass.planner.cache import CandidateCache
from tdpass.planner.candidates import (
    KEPT_WEIGHTS,
    Candidate,
    SiteFits,
    as_it_is,
    dense_candidate,
    enumerate_candidates,
    on_offer,
)
from tdpass.planner.divergence import FittedDivergence
from tdpass.planner.effort import THOROUGH, Allowance, Deadline, Effort
from tdpass.planner.frontier import frontier
from tdpass.planner.joint import JOINT_CHANGES, Carries, always, joint_options, unoffered
from tdpass.planner.losses import Losses
from tdpass.planner.moments import stream_metrics
from tdpass.planner.offers import NOTHING, Offer
from tdpass.planner.sensitivity import Sweep
from tdpass.planner.settling import Settling
from tdpass.planner.sparing import without_spare
from tdpass.planner.table import Table
from tdpass.planner.tried_ranks import as_given
from tdpass.site import Site
from tdpass.tape import Tape, site_order
from tdpass.targets.base import Target

_SLACK = 1.5
_SETTLE_SHARE = 0.3
_FIT_SHARE = 0.5
_JOINT_SHARE = 0.25


@dataclass(frozen=True)
class Dense:
    """The weight and bias of a site, read when needed, and the forms of those that are in one already."""

    weight: Callable[[str], Tensor]
    bias: Callable[[str], Tensor | None]
    forms: Mapping[str, Form] = field(default_factory=dict)

    def form(self, site: Site) -> Form:
        """The form that a site is in."""
        return self.forms.get(site.name, DENSE)

    def fits(self, site: Site, metric: Metric, effort: Effort) -> SiteFits:
        """All formats of a site in a metric."""
        weight, bias = self.weight(site.name), self.bias(site.name)
        return SiteFits(site, weight, bias, metric, rough=effort.rough, present=self.form(site))


@dataclass(frozen=True)
class Tabulation:
    """What candidates of every site and their losses are made from, into a table.

    With recorded runs, errors are weighed by the data and losses measured as the divergence of the network's
    output with one candidate in place; as many as the effort has time for are measured, the rest follow from
    their errors.  Without, the loss of a candidate is the squared relative error of its weight.  `context`
    identifies model and data in the cache.  With `target` the candidates are meant for it: ranks that fill
    the machine, and of every format those that may turn out to be cheaper there. `offer` has number types and
    supports that factors, and dense weights, may be stored in; with `pivot` factors hold nothing twice where
    that can be.
    """

    sites: Sequence[Site]
    dense: Dense
    tapes: Sequence[Tape]
    divergence: FittedDivergence
    formats: Sequence[str] = ()
    cache: CandidateCache = field(default_factory=lambda: CandidateCache(None))
    context: str = ""
    tick: Progress = silent
    target: Target | None = None
    effort: Effort = THOROUGH
    offer: Offer = NOTHING
    pivot: bool = False

    def table(self) -> Table:
        """Candidates and losses for every site; what the cache holds is not computed again."""
        fingerprints = {site.name: digest(self.dense.weight(site.name)) for site in self.sites}
        keys = self._keys(fingerprints)
        known = {name: found for name, key in keys.items() if (found := self.cache.get(key)) is not None}
        missing = [site for site in self.sites if site.name not in known]
        losses = self._losses(len(missing))
        declined, held = dict[str, str](), dict[str, SiteFits]()
        for fits, deadline in self._fitted(missing):
            name = fits.site.name
            if self._measures_losses and fits.site.weights <= KEPT_WEIGHTS:
                held[name] = fits
            try:
                known[name] = self._candidates(fits, losses, deadline)
                self.cache.put(keys[name], known[name])
            except NumericalError as error:
                known[name], declined[name] = [], str(error)
        table = Table(
            tuple(self.sites),
            {site.name: known[site.name] for site in self.sites},
            [],
            fingerprints,
            declined=declined,
        )
        present = [site for site in self.sites if site.name in self.dense.forms]
        table.present = {site.name: as_it_is(site, self.dense.form(site)) for site in present}
        if self._measures_losses:
            table.settling = self._settling(keys, held)
        if self.tapes:
            table.metric = "inputs and outputs on the calibration data"
            table.divergence = str(self.divergence)
        return table

    def add_joint_options(self, table: Table, carries: Carries = always) -> None:
        """Add the options that change several sites together, those that the model `carries`."""
        geometry = (f"{site.name}{_identity(site)}" for site in table.sites)
        key = digest("joint changes", *JOINT_CHANGES.names(), self.effort.name, self.context, *geometry)
        known = self.cache.get_joint(key)
        sites = {site.name: site for site in table.sites if site.name not in table.present}
        if known is None:
            known = joint_options(
                sites,
                self.dense.weight,
                self.dense.bias,
                self.effort.for_moments(self.tapes),
                self._sweep(len(sites)),
                self.tick,
                _JOINT_SHARE * self.effort.limit,
                carries=carries,
            )
            self.cache.put_joint(key, known)
        table.joint = known
        table.apart = unoffered(known, self.tapes, sites)

    @property
    def _measures_losses(self) -> bool:
        return bool(self.tapes) and self.effort.measured

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.formats) or offered_formats()

    def _keys(self, fingerprints: Mapping[str, str]) -> dict[str, str]:
        """Of every site, what its candidates depend on as a key of the cache."""
        versions = ",".join(f"{name}{FORMATS.get(name).version}" for name in self._names)
        filled = () if self.target is None else (self.target.filled_by,)
        wishes = (*((str(self.offer),) if self.offer else ()), *(("spared",) if self.pivot else ()))
        purpose = (self.effort.name, str(self.effort.ranks), *filled, *wishes)
        return {
            site.name: digest(
                fingerprints[site.name],
                *_identity(site, self.dense.form(site)),
                versions,
                self.context,
                *purpose,
            )
            for site in self.sites
        }

    def _sweep(self, sites: int) -> Sweep:
        return Sweep(self.tapes, self.divergence, self.effort.for_losses(sites))

    def _losses(self, missing: int) -> Losses:
        return Losses(self._sweep(missing) if self.tapes and missing else None, missing, self.effort)

    def _fitted(self, missing: Sequence[Site]) -> Iterator[tuple[SiteFits, Deadline]]:
        """Sites in the order in which the runs call them, and until when candidates of each may be looked for."""
        if not missing:
            return
        metrics: Iterator[tuple[Site, Metric]] = ((site, Metric()) for site in missing)
        if self.tapes:
            metrics = stream_metrics(
                self.effort.for_moments(self.tapes),
                _in_order(missing, self.tapes),
                self.divergence,
                lambda n, of: self.tick("reading calibration data", n, of),
            )
        limit = (1 - _JOINT_SHARE) * self.effort.limit
        allowance = Allowance(limit, _importance(missing))
        expected = self.effort.expected(sum(tape.batch_size for tape in self.tapes), missing)
        what = f"planning, about {max(1.0, expected):.0f} s of one core"
        self.tick(what, 0, len(missing))
        for done, (site, metric) in enumerate(metrics, start=1):
            deadline = allowance.take(site.name)
            yield self.dense.fits(site, metric, self.effort), deadline
            self.tick(what, done, len(missing))

    def _candidates(self, fits: SiteFits, losses: Losses, deadline: Deadline) -> list[Candidate]:
        """Those of a site that no other beats, with their losses."""
        target, effort, names = self.target, self.effort, self._names
        filling = as_given if target is None else target.filling
        measures = ("macs", "params") if all(site.seen for site in self.sites) else ("params",)
        fitting = deadline.part(_FIT_SHARE)
        found = enumerate_candidates(
            fits, names, effort.ranks, filling, effort.searches, fitting, effort.ends
        )
        best = _worth_timing(found, measures) if target is not None else frontier(found, measures)
        if self.offer:
            stored = on_offer(fits, best, self.offer, deadline.part(_FIT_SHARE))
            slack = 1.0 if target is None else _SLACK
            best = frontier([*best, *stored], (*measures, "bytes"), slack)
        known = losses.of(best, fits, deadline)
        if not self.pivot:
            return known
        beaten = [candidate for candidate in found if candidate not in best]
        spared = without_spare(known, beaten, names, measures, fits, effort.ranks, filling)
        return [*(known if target is not None else ()), *spared]

    def _settling(self, keys: Mapping[str, str], held: dict[str, SiteFits]) -> Settling:
        """What measures losses later on; sites too large to be held keep the losses that were estimated."""
        small = {site.name: site for site in self.sites if site.weights <= KEPT_WEIGHTS}

        def fitted(names: Sequence[str]) -> Iterator[SiteFits]:
            wanted = _in_order([small[name] for name in names if name in small], self.tapes)
            for site, metric in stream_metrics(self.effort.for_moments(self.tapes), wanted, self.divergence):
                yield self.dense.fits(site, metric, self.effort)

        def keep(name: str, candidates: list[Candidate]) -> None:
            self.cache.put(keys[name], candidates)

        return Settling(
            lambda: self._sweep(len(self.sites)), fitted, keep, _SETTLE_SHARE * self.effort.limit, held
        )


def _identity(site: Site, form: Form = DENSE) -> tuple[str, ...]:
    """What the candidates of a site in that form and their costs depend on, besides its weight."""
    present = () if form == DENSE else (str(form),)
    return str(site.geometry()), str(site.bias), str((site.extents, site.samples)), *present


def _worth_timing(candidates: Sequence[Candidate], measures: Sequence[str]) -> list[Candidate]:
    """Every format's own frontier, without what errs far more than another at no less cost.

    What counts less may still be slower.
    """
    names = dict.fromkeys(candidate.format for candidate in candidates)
    best = [
        c
        for name in names
        for c in frontier([candidate for candidate in candidates if candidate.format == name], measures)
    ]
    return frontier(best, measures, _SLACK)


def _importance(sites: Sequence[Site]) -> dict[str, float]:
    """By how much of the network's multiply-adds and weights a site holds, and a little for each alike."""
    macs = sum(dense_candidate(site).cost.macs for site in sites) or 1
    weights = sum(site.weights for site in sites) or 1
    return {
        site.name: dense_candidate(site).cost.macs / macs + site.weights / weights + 1 / len(sites)
        for site in sites
    }


def _in_order(sites: Sequence[Site], tapes: Sequence[Tape]) -> list[Site]:
    """Those that some run calls by first call, so that a sweep mostly moves forward; then the others."""
    order = {name: place for place, name in enumerate(site_order(tapes))}
    return sorted(sites, key=lambda site: order.get(site.name, len(order)))
