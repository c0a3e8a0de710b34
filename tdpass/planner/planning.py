"""Planning: candidates of every site, their losses, and options that change several sites together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tdpass.digest import digest
from tdpass.errors import NumericalError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, offered_formats
from tdpass.formats.layer import Layer
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
from tdpass.planner.frontier import frontier, with_loss
from tdpass.planner.joint import JOINT_CHANGES, joint_options
from tdpass.planner.moments import stream_metrics
from tdpass.planner.offers import NOTHING, Offer
from tdpass.planner.sensitivity import Sweep, estimate_losses, measure_losses
from tdpass.planner.settling import Settling
from tdpass.planner.sparing import without_spare
from tdpass.planner.table import Table
from tdpass.planner.tried_ranks import as_given
from tdpass.site import Site
from tdpass.tape import Tape, site_order
from tdpass.targets.base import Target

SWEEP_SECONDS = 240.0
_SLACK = 1.5
_SETTLE_SHARE = 0.3
_FIT_SHARE = 0.5
_JOINT_SHARE = 0.25

Tick = Callable[[str, int, int], None]


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


def tabulate(
    sites: Sequence[Site],
    dense: Dense,
    tapes: Sequence[Tape],
    divergence: FittedDivergence,
    formats: Sequence[str] = (),
    cache: CandidateCache | None = None,
    context: str = "",
    tick: Tick = lambda what, done, of: None,
    target: Target | None = None,
    effort: Effort = THOROUGH,
    offer: Offer = NOTHING,
    pivot: bool = False,
) -> Table:
    """Candidates and losses for every site.

    With recorded runs, errors are weighed by the data and losses measured as the divergence of the network's
    output with one candidate in place; as many as the effort has time for are measured, the rest follow from
    their errors.  Without, the loss of a candidate is the squared relative error of its weight.  `context`
    identifies model and data in the cache.  With `target` the candidates are meant for it: ranks that fill
    the machine, and of every format those that may turn out to be cheaper there. `offer` has number types and
    supports that factors, and dense weights, may be stored in; with `pivot` factors hold nothing twice where
    that can be.
    """
    cache = cache or CandidateCache(None)
    names = tuple(formats) or offered_formats()
    for name in names:
        FORMATS.get(name)
    versions = ",".join(f"{name}{FORMATS.get(name).version}" for name in names)
    fingerprints = {site.name: digest(dense.weight(site.name)) for site in sites}
    wishes = (*((str(offer),) if offer else ()), *(("spared",) if pivot else ()))
    purpose = (effort.name, str(effort.ranks), *(() if target is None else (target.filled_by,)), *wishes)
    keys = {
        site.name: digest(
            fingerprints[site.name], *_identity(site, dense.form(site)), versions, context, *purpose
        )
        for site in sites
    }
    known = {site.name: found for site in sites if (found := cache.get(keys[site.name])) is not None}
    missing = [site for site in sites if site.name not in known]
    measures = ("macs", "params") if all(site.seen for site in sites) else ("params",)
    sweep = Sweep(tapes, divergence, effort.for_losses(len(missing))) if tapes and missing else None
    metrics: Iterator[tuple[Site, Metric]] = (
        stream_metrics(
            effort.for_moments(tapes),
            _in_order(missing, tapes),
            divergence,
            lambda n, of: tick("reading calibration data", n, of),
        )
        if tapes
        else ((site, Metric()) for site in missing)
    )
    limit = (1 - _JOINT_SHARE) * effort.limit
    allowance = Allowance(limit, _importance(missing))
    what = "planning" if math.isinf(limit) else f"planning, {limit:.0f} s of one core at most"
    declined, held = dict[str, str](), dict[str, SiteFits]()
    filling = as_given if target is None else target.filling
    if missing:
        tick(what, 0, len(missing))
    for done, (site, metric) in enumerate(metrics, start=1):
        deadline = allowance.take(site.name)
        fits = dense.fits(site, metric, effort)
        if effort.measured and tapes and site.weights <= KEPT_WEIGHTS:
            held[site.name] = fits
        try:
            found = enumerate_candidates(
                fits, names, effort.ranks, filling, effort.searches, deadline.part(_FIT_SHARE)
            )
            best = _worth_timing(found, measures) if target is not None else frontier(found, measures)
            if offer:
                stored = on_offer(fits, best, offer, deadline.part(_FIT_SHARE))
                slack = 1.0 if target is None else _SLACK
                best = frontier([*best, *stored], (*measures, "bytes"), slack)
            known[site.name] = _with_losses(best, fits, sweep, len(missing), deadline, effort)
            if pivot:
                beaten = [candidate for candidate in found if candidate not in best]
                spared = without_spare(known[site.name], beaten, names, measures, fits, effort.ranks, filling)
                known[site.name] = [*(known[site.name] if target is not None else ()), *spared]
            cache.put(keys[site.name], known[site.name])
        except NumericalError as error:
            known[site.name], declined[site.name] = [], str(error)
        tick(what, done, len(missing))
    table = Table(
        tuple(sites), {site.name: known[site.name] for site in sites}, [], fingerprints, declined=declined
    )
    table.present = {
        site.name: as_it_is(site, dense.form(site)) for site in sites if site.name in dense.forms
    }
    if tapes and effort.measured:

        def keep(name: str, candidates: list[Candidate]) -> None:
            cache.put(keys[name], candidates)

        table.settling = _settling(sites, dense, tapes, divergence, effort, keep, held)
    if tapes:
        table.metric = "inputs and outputs on the calibration data"
        table.divergence = str(divergence)
    return table


def _settling(
    sites: Sequence[Site],
    dense: Dense,
    tapes: Sequence[Tape],
    divergence: FittedDivergence,
    effort: Effort,
    keep: Callable[[str, list[Candidate]], None],
    held: dict[str, SiteFits],
) -> Settling:
    """What measures losses later on; sites too large to be held keep the losses that were estimated."""
    small = {site.name: site for site in sites if site.weights <= KEPT_WEIGHTS}

    def fitted(names: Sequence[str]) -> Iterator[SiteFits]:
        wanted = _in_order([small[name] for name in names if name in small], tapes)
        for site, metric in stream_metrics(effort.for_moments(tapes), wanted, divergence):
            yield dense.fits(site, metric, effort)

    def begin() -> Sweep:
        return Sweep(tapes, divergence, effort.for_losses(len(sites)))

    return Settling(begin, fitted, keep, _SETTLE_SHARE * effort.limit, held)


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


def _with_losses(
    candidates: list[Candidate],
    fits: SiteFits,
    sweep: Sweep | None,
    sites: int,
    deadline: Deadline,
    effort: Effort,
) -> list[Candidate]:
    if not candidates:
        return []
    if sweep is None:
        return [with_loss(candidate, candidate.error**2) for candidate in candidates]

    def layers(candidate: Candidate) -> Callable[[], Mapping[str, Layer]]:
        return lambda: {fits.site.name: fits.layer(candidate.form)}

    errors = [candidate.error for candidate in candidates]
    if not effort.measured and fits.metric.outputs is not None:
        losses = estimate_losses(fits.metric, fits.weight, errors)
    else:
        each = max(sweep.seconds_from([fits.site.name]), 1e-9)
        allowed = (
            1
            if not effort.measured
            else int(min(deadline.left / each, SWEEP_SECONDS / (sites * sweep.seconds / 2 + 1e-9)))
        )
        losses = measure_losses(
            sweep, [layers(candidate) for candidate in candidates], errors, allowed, deadline
        )
    return [
        with_loss(candidate, loss.value, not loss.measured)
        for candidate, loss in zip(candidates, losses, strict=True)
        if math.isfinite(loss.value)
    ]


def add_joint_options(
    table: Table,
    dense: Dense,
    tapes: Sequence[Tape],
    divergence: FittedDivergence,
    cache: CandidateCache | None = None,
    context: str = "",
    tick: Tick = lambda what, done, of: None,
    effort: Effort = THOROUGH,
) -> None:
    """Add the options that change several sites together."""
    cache = cache or CandidateCache(None)
    key = digest(
        "joint changes",
        *JOINT_CHANGES.names(),
        effort.name,
        context,
        *(f"{site.name}{_identity(site)}" for site in table.sites),
    )
    known = cache.get_joint(key)
    if known is None:
        sites = {site.name: site for site in table.sites if site.name not in table.present}
        sweep = Sweep(tapes, divergence, effort.for_losses(len(sites)))
        seconds = _JOINT_SHARE * effort.limit
        known = joint_options(
            sites, dense.weight, dense.bias, effort.for_moments(tapes), sweep, tick, seconds
        )
        cache.put_joint(key, known)
    table.joint = known


def _in_order(sites: Sequence[Site], tapes: Sequence[Tape]) -> list[Site]:
    """Those that some run calls by first call, so that a sweep mostly moves forward; then the others."""
    order = {name: place for place, name in enumerate(site_order(tapes))}
    return sorted(sites, key=lambda site: order.get(site.name, len(order)))
