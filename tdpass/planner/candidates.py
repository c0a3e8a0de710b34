"""Candidates: what a site could become, with cost and error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tdpass.cost import Cost, pays
from tdpass.errors import NumericalError, PlanError
from tdpass.form import DENSE, Form, Formed, Rank
from tdpass.formats.base import FORMATS, Decomposition, Factors, Format
from tdpass.formats.layer import Layer, check_form, cost_of
from tdpass.formats.metric import Metric
from tdpass.planner.effort import NEVER, Deadline, seconds_to_fit
from tdpass.planner.offers import Offer
from tdpass.planner.remainders import stored_beside
from tdpass.planner.rounding import Way, rounded_factor
from tdpass.planner.tried_ranks import Filling, as_given, worthwhile_ranks
from tdpass.site import Site

KEPT_WEIGHTS = 2**18
_KEPT_SEARCHED = 2**22
_SEARCHED_WEIGHTS = 2**19
_COMPENSATED = 1152  # columns up to which what each loses is made up for in rough fits too
_CLEARLY = 1.25
_PLAIN_SHARE = 0.4


@dataclass(frozen=True)
class Candidate(Formed):
    """One way to store a site.

    `error` is the relative error in the metric, `loss` the expected increase of the divergence. `kernel` is
    the runtime that its seconds were measured in; `estimated` says that the loss was not measured.
    """

    form: Form
    cost: Cost
    error: float
    loss: float = 0.0
    guarantee: str = ""
    kernel: str = ""
    estimated: bool = False


def bias_cost(site: Site, bias: Tensor | None) -> Cost:
    """What the bias of a layer that replaces the site stores beyond the site's own."""
    numbers = (0 if bias is None else bias.numel()) - (site.o if site.bias else 0)
    return Cost(params=numbers, bytes=numbers * site.itemsize)


def dense_candidate(site: Site) -> Candidate:
    """The site as a dense layer."""
    return as_it_is(site, DENSE)


def as_it_is(site: Site, form: Form) -> Candidate:
    """The site in the form that it is in."""
    return Candidate(form, cost_of(site, form), 0.0)


class SiteFits:
    """All formats of one site, decomposed on demand in one metric; with `start` its factors go on from these.

    `rough` fits are good enough to compare candidates by, not to keep.  `present` is the form that the site
    is in, than which candidates are to be smaller.
    """

    def __init__(
        self,
        site: Site,
        weight: Tensor,
        bias: Tensor | None,
        metric: Metric,
        start: Factors | None = None,
        rough: bool = False,
        present: Form = DENSE,
    ) -> None:
        self.present = present
        self.site, self.metric, self.rough = site, metric, rough
        self.weight = weight.double()
        self.dtype = weight.dtype
        self.bias, self.start = bias, start
        self._decompositions: dict[str, Decomposition] = {}
        self._factors: dict[tuple[str, Rank], Factors] = {}
        self._stored: dict[Form, Layer] = {}

    @cached_property
    def _whole(self) -> float:
        """The squared norm of the weight, which every error is a part of."""
        return self.metric.square(self.weight.flatten(1))

    def decomposition(self, format_name: str) -> Decomposition:
        """The shared work of a format, done once."""
        if format_name not in self._decompositions:
            made = FORMATS.get(format_name).begin(self.weight, self.site, self.metric)
            made.rough = self.rough
            self._decompositions[format_name] = made
        return self._decompositions[format_name]

    def factors(self, format_name: str, rank: Rank) -> Factors:
        """Factors of one rank; those of small sites are kept, since errors and losses both need them."""
        key = (format_name, rank)
        if key in self._factors:
            return self._factors[key]
        if self.start is None:
            factors = self.decomposition(format_name).factors(rank)
        else:
            factors = FORMATS.get(format_name).refine(self.weight, self.site, rank, self.start, self.metric)
        if self.site.weights <= (_KEPT_SEARCHED if FORMATS.get(format_name).searched else KEPT_WEIGHTS):
            self._factors[key] = factors
        return factors

    def form(self, format_name: str, rank: Rank) -> Form:
        """The form of factors: in the number type that the weight is stored in already, where they fit it."""
        plain, kinds = Form(format_name, rank), set(self.present.numbers)
        stored = replace(plain, numbers=tuple(kinds))
        return stored if len(kinds) == 1 and _fits(self.site, stored) else plain

    def at_hand(self, form: Form) -> bool:
        """Whether its factors are kept, or found without a search."""
        return (form.format, form.rank) in self._factors or not FORMATS.get(form.format).searched

    def layer(self, form: Form) -> Layer:
        """The layer in that form, its bias shifted so that the mean output on calibration data stays."""
        made, bias, lost = self._unbiased(form), self.bias, None
        if self._shifts_bias(form):
            lost = self.metric.mean_output((self.weight - self._weight_of(made)).flatten(1))
        if lost is not None:
            bias = lost if bias is None else bias.double() + lost
        return replace(made, bias=bias).to(self.dtype)

    def candidate(self, form: Form) -> Candidate:
        """Cost and measured error of one form."""
        guarantee = None if form.encoded else self.decomposition(form.format).guarantee(form.rank)
        if guarantee is not None and guarantee.kind == "exact":
            error = guarantee.value
        else:
            made = self._weight_of(self._unbiased(form))
            error = self.metric.relative_error(self.weight, made, self._whole)
        return Candidate(form, self.cost(form), error, guarantee="" if guarantee is None else str(guarantee))

    def cost(self, form: Form) -> Cost:
        """What the layer costs, with the bias that keeps the mean where the site has none."""
        cost = cost_of(self.site, form)
        gains = self._shifts_bias(form) and not self.site.bias
        return cost + Cost(params=self.site.o, bytes=self.site.o * self.site.itemsize) if gains else cost

    def _shifts_bias(self, form: Form) -> bool:
        """Whether it is worth a bias to keep the mean.

        A layer that stays whole gets none that it did not have.
        """
        return self.metric.mean is not None and (self.site.bias or form.format != DENSE.format)

    def _unbiased(self, form: Form) -> Layer:
        if form in self._stored:
            return self._stored[form]
        plain = Layer(self.site, replace(form, numbers=(), support=""), self.factors(form.format, form.rank))
        if not form.encoded:
            return plain
        made = self._rounded(plain.to(self.dtype), form)
        if self.site.weights <= KEPT_WEIGHTS:
            self._stored[form] = made
        return made

    def _rounded(self, plain: Layer, form: Form) -> Layer:
        """The layer in number types of its own.

        What is the weight itself, or what others leave of it, is rounded in the metric of the inputs, where
        that is known.
        """
        inputs, groups = self.metric.inputs, self.metric.groups
        covariance: Tensor | None = None
        if inputs is not None and inputs.dim() == 2 + (groups > 1):
            covariance = inputs.double() if groups > 1 else inputs.double()[None]
        wide = covariance is not None and covariance.shape[-1] > _COMPENSATED
        way: Way = "activations" if self.rough and wide else "moments"
        if FORMATS.get(form.format).remainder:
            parts = stored_beside(self.weight, plain, form, self.metric, covariance, way)
            return replace(plain, form=form, factors=parts)
        if plain.form != DENSE or covariance is None:
            return plain.stored(form)
        storage, (name,) = replace(plain, form=form).storage, plain.factors
        rounded = rounded_factor(
            plain.factors[name], covariance, storage.numbers[name], storage.supports.get(name), way
        )
        return replace(plain, form=form, factors=storage.stored(name, rounded.factor, rounded.beside))

    def _weight_of(self, layer: Layer) -> Tensor:
        return FORMATS.get(layer.format).reconstruct(dict(layer.values(torch.float64)), self.site)


def enumerate_candidates(
    fits: SiteFits,
    formats: Sequence[str],
    ranks_per_format: int,
    filling: Filling = as_given,
    searches: int = 12,
    deadline: Deadline = NEVER,
    ends: int = 2,
) -> list[Candidate]:
    """All candidates of a site that pay, by format; dense is not among them.

    A format that searches each rank gets `searches` of them, fewer on a large layer, and is given up after
    its middle rank where another format is clearly better at no more cost.  Past the deadline no further rank
    is tried; the first `ends` of every format that needs no search (the middle one, the smallest) are in any
    case, and so is one candidate at least.  With no `ends`, a fit that would end behind it is not begun.

    Raises `NumericalError` where no format can be fitted in floating point.
    """
    site = fits.site
    found: list[Candidate] = []
    failed: list[str] = []
    for fmt in sorted((FORMATS.get(name) for name in formats), key=lambda fmt: (fmt.searched, fmt.name)):
        if not fmt.fits(site):
            continue
        limit = (
            max(1, min(searches, ranks_per_format, _SEARCHED_WEIGHTS // site.weights))
            if fmt.searched
            else ranks_per_format
        )
        ranks = worthwhile_ranks(site, fmt.name, limit, filling, fits.present)
        try:
            found += _of_format(
                fits, fmt, ranks, found, deadline if fmt.searched else deadline.part(_PLAIN_SHARE), ends
            )
        except (LinAlgError, NumericalError) as error:
            failed.append(f"{fmt.name}: {error}")
    if failed and not found:
        raise NumericalError(f"no format can be fitted to site {site.name!r} ({'; '.join(failed)})")
    return found


def on_offer(
    fits: SiteFits, candidates: Sequence[Candidate], offer: Offer, deadline: Deadline = NEVER
) -> list[Candidate]:
    """The dense layer and the candidates whose factors are at hand.

    There is one in each number type and with each support on offer. Those only that take fewer bytes than
    dense and no more of anything else that is known, but that factors beside a remainder are multiplied and
    counted besides; past the deadline, of the dense layer alone.
    """
    now = cost_of(fits.site, fits.present)
    wanted = [*offer.forms(DENSE), *offer.with_remainder(fits.site)]
    found = [fits.candidate(form) for form in wanted if _fits(fits.site, form)]
    for candidate in candidates:
        if deadline.left > 0 and fits.at_hand(candidate.form):
            found += [fits.candidate(form) for form in offer.forms(candidate.form) if _fits(fits.site, form)]
    kept = [
        candidate
        for candidate in found
        if math.isfinite(candidate.error) and candidate.cost.bytes < now.bytes
    ]
    return [
        candidate
        for candidate in kept
        if FORMATS.get(candidate.format).remainder
        or all(candidate.cost.get(m) <= now.get(m) for m in ("params", "macs"))
    ]


def _fits(site: Site, form: Form) -> bool:
    """Whether the number types and the support of a form divide its factors."""
    try:
        check_form(site, form)
    except PlanError:
        return False
    return True


def _of_format(
    fits: SiteFits,
    fmt: Format,
    ranks: Sequence[Rank],
    others: Sequence[Candidate],
    deadline: Deadline,
    ends: int,
) -> list[Candidate]:
    """Candidates of one format: its middle rank, its smallest, then the others coarse to fine.

    It stops at the deadline.
    """
    found: list[Candidate] = []
    needed = 0.0 if ends else seconds_to_fit(fits.site)
    for rank in coarse_first(ranks):
        enough = len(found) >= max(1, ends) or (others and (fmt.searched or not ends))
        if enough and deadline.left <= needed:
            break
        candidate = fits.candidate(fits.form(fmt.name, rank))
        if not math.isfinite(candidate.error) or not _smaller(candidate, fits):
            continue
        if fmt.searched and not found and _hopeless(candidate, others):
            break
        found.append(candidate)
    return found


def _smaller(candidate: Candidate, fits: SiteFits) -> bool:
    """Whether it is smaller than the site as it is.

    Of one that is stored in number types of its own, in bytes too.
    """
    now = cost_of(fits.site, fits.present)
    return pays(candidate.cost, now) and not (fits.present.encoded and candidate.cost.bytes > now.bytes)


def coarse_first(ranks: Sequence[Rank]) -> list[Rank]:
    """The middle one, the last, then every third of the others, then the rest."""
    middle = ranks[len(ranks) // 2 : len(ranks) // 2 + 1]
    return list(dict.fromkeys([*middle, *ranks[-1:], *ranks[::3], *ranks]))


def _hopeless(candidate: Candidate, found: Sequence[Candidate]) -> bool:
    """Whether one found before is clearly better at no more cost."""
    cost = candidate.cost
    return any(
        other.error * _CLEARLY <= candidate.error
        and other.cost.macs <= cost.macs
        and other.cost.params <= cost.params
        for other in found
    )
