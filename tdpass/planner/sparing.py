"""Candidates without what their factors hold twice: those of the formats as they are, at lower costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tdpass.errors import NumericalError
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import cost_of
from tdpass.formats.pivoted import PIVOT, Pivoted
from tdpass.planner.candidates import Candidate, SiteFits
from tdpass.planner.frontier import frontier, with_loss
from tdpass.planner.sensitivity import between
from tdpass.planner.tried_ranks import Filling, as_given, worthwhile_ranks


def without_spare(
    known: Sequence[Candidate],
    others: Sequence[Candidate],
    names: Sequence[str],
    measures: Sequence[str],
    fits: SiteFits,
    ranks: int,
    filling: Filling = as_given,
) -> list[Candidate]:
    """Candidates with known losses, each at the cost that it has without what its factors hold twice.

    What a layer answers stays, so do errors and losses; no choice among them costs more than without.  Added
    are `others`, which were beaten at their plain costs, and ranks that only pay so; their losses follow from
    those that are known.
    """
    points = sorted((candidate.error, candidate.loss) for candidate in known)
    plain = (*others, *_above(names, fits, ranks, filling)) if points else ()
    cheaper = [_spared(candidate, fits) or candidate for candidate in known]
    added = [lean for candidate in plain if (lean := _spared(candidate, fits)) is not None]
    best = frontier([*cheaper, *added], measures)
    estimated = [
        with_loss(candidate, between(points, candidate.error), estimated=True)
        for candidate in added
        if candidate in best
    ]
    return [*cheaper, *estimated]


def _lean(name: str) -> Pivoted | None:
    """The format that spares what the named one holds twice."""
    found = FORMATS.get(name + PIVOT) if name + PIVOT in FORMATS else None
    return found if isinstance(found, Pivoted) else None


def _spared(candidate: Candidate, fits: SiteFits) -> Candidate | None:
    """The candidate in the format without what it holds twice; None where none is, or none is exact."""
    form, lean = candidate.form, _lean(candidate.format)
    if form.encoded or lean is None or not lean.fits(fits.site) or not lean.spares(fits.site, form.rank):
        return None
    if fits.at_hand(form):
        try:
            lean.from_chain(fits.factors(form.format, form.rank), fits.site)
        except NumericalError:
            return None
    less = cost_of(fits.site, form) - cost_of(fits.site, Form(lean.name, form.rank))
    return replace(candidate, form=Form(lean.name, form.rank), cost=candidate.cost - less)


def _above(names: Sequence[str], fits: SiteFits, ranks: int, filling: Filling) -> list[Candidate]:
    """Candidates of ranks that pay only without what their factors hold twice, in the plain formats."""
    found: list[Candidate] = []
    for name in names:
        lean = _lean(name)
        if lean is None or FORMATS.get(name).searched or not lean.fits(fits.site):
            continue
        plain = worthwhile_ranks(fits.site, name, ranks, filling, fits.present)
        lean_ranks = worthwhile_ranks(fits.site, lean.name, ranks, filling, fits.present)
        found += [fits.candidate(Form(name, rank)) for rank in lean_ranks if rank not in plain]
    return found
