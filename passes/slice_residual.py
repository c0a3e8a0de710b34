"""slice-residual: residual streams rotated to their principal directions, and stored in fewer of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tdpass.cost import Budget, BudgetValue, Cost, amount, bounded
from tdpass.errors import BudgetError, InvalidModelError, UnsupportedError, UsageError
from tdpass.job import Job
from tdpass.measures import counted
from tdpass.models.abilities import SlicesStreams
from tdpass.models.base import Batch, Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.streams import Basis, find_bases, find_streams, sliced
from tdpass.planner.streams.slicing import LEAST
from tdpass.planner.trials import Promise, gap

_ROUNDING = 1e-3


@register_pass
@dataclass(frozen=True)
class SliceResidual(Pass):
    """Store the streams between norms in fewer channels (SliceGPT): a narrower dense network.

    `keep` is the share of channels that is left; with a budget among the options (`params=0.8`) it is the
    largest that meets it.  Scales, shifts and the subtraction of means become part of the layers around a
    norm.  Where a norm's output is added to again, or returned, an adapter is put behind the norm.  The model
    at full width is held against the original before anything is left out.  Comes before `plan`, which then
    sees the narrower network.
    """

    name = "slice-residual"
    promise = Promise.PLAN

    gathers = MappingProxyType({"bounds": bounded})

    bounds: Mapping[str, BudgetValue] = field(default_factory=dict)
    keep: float = 0.75

    def run(self, model: Model, job: Job) -> bool:
        if not 0 < self.keep <= 1:
            raise UsageError(
                f"keep={self.keep!r} is no share of the channels; give one in (0, 1], or a budget such as "
                "params=0.8"
            )
        job.expected = job.expected or 0.0
        why = _why_not(model, job)
        if why:
            job.note(f"skipped: {why}")
            return False
        streams = find_streams(model.record(_example(model, job)))
        for reason in streams.reasons():
            job.note(f"a stream keeps its coordinates: {reason}")
        bases = find_bases(streams, job.tapes(model)) if streams.turning() else {}
        ways = _Ways(model, _example(model, job), bases)
        why = ways.why_not(self.keep) if bases else "no stream that norms read may turn"
        if why:
            job.note(f"left as it was: {why}")
            return False
        keep = ways.largest(Budget.parse(self.bounds), job.original) if self.bounds else self.keep
        before = {site.name: site for site in model.sites()}
        _slice(model, ways.example, bases, keep)
        job.rewritten(model, before)
        width = sorted({basis.width for basis in bases.values()})
        job.note(
            f"{len(bases)} streams of {', '.join(map(str, width))} channels keep {keep:.3g} of them; "
            f"divergence {job.lost:.4g}"
        )
        return True


@dataclass(frozen=True)
class _Ways:
    """A model at several widths, made on copies of it."""

    model: Model
    example: Batch
    bases: Mapping[int, Basis]

    def at(self, keep: float) -> Model:
        """A copy that keeps that share of its channels."""
        twin = self.model.clone()
        _slice(twin, self.example, self.bases, keep)
        return twin

    def why_not(self, keep: float) -> str:
        """Why the model cannot be sliced: at full width it differs, or at that width it does not run."""
        answer = self.model.run(self.example)
        try:
            moved = gap(answer, self.at(1.0).run(self.example))
            self.at(min(keep, 0.5)).run(self.example)
        except (InvalidModelError, UnsupportedError) as error:
            return f"it does not run in fewer channels: {error}"
        return (
            f"rotated, it answers otherwise by {moved:.2g} of its outputs' size" if moved > _ROUNDING else ""
        )

    def largest(self, budget: Budget, original: Cost) -> float:
        """The largest share that is within a budget; raises `BudgetError` where none is."""
        width = max(basis.width for basis in self.bases.values())
        limits = budget.limits(original)
        if wrong := [measure for measure in limits if measure not in counted()]:
            raise BudgetError(
                f"{SliceResidual.name} takes no budget on {wrong[0]}; bound one of {', '.join(counted())}"
            )
        least = self._cost(LEAST / width)
        for measure, limit in limits.items():
            if least.get(measure) > limit:
                raise BudgetError(
                    f"the budget of {amount(measure, limit)} {measure} cannot be met by slicing streams; the "
                    f"smallest that can is {amount(measure, least.get(measure))}"
                )
        low, high = LEAST, width + 1
        while high - low > 1:
            middle = (low + high) // 2
            cost = self._cost(middle / width)
            within = all(cost.get(measure) <= limit for measure, limit in limits.items())
            low, high = (middle, high) if within else (low, middle)
        return low / width

    def _cost(self, keep: float) -> Cost:
        twin = self.at(keep)
        return Cost(twin.params(), twin.count(self.example).per_sample, twin.bytes())


def _slice(model: Model, example: Batch, bases: Mapping[int, Basis], keep: float) -> None:
    assert isinstance(model, SlicesStreams)
    model.slice_streams(sliced(find_streams(model.record(example)), bases, keep))


def _example(model: Model, job: Job) -> Batch:
    return job.batches[0].part(0, 2) if job.batches[0].divisible else model.example() or job.batches[0]


def _why_not(model: Model, job: Job) -> str:
    if not job.batches:
        return "there is no calibration data"
    if not isinstance(model, SlicesStreams):
        return f"a model of {model.frontend} cannot be changed so"
    if any(model.layer(site.name) is not None for site in model.sites()):
        return "some layers are replaced already; it comes before passes that do that"
    return ""
