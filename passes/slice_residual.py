"""slice-residual: residual streams rotated to their principal directions, and stored in fewer of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from tdpass.cost import Budget, BudgetValue, bounded
from tdpass.errors import InvalidModelError, UnsupportedError
from tdpass.job import Job
from tdpass.models.abilities import SlicesStreams
from tdpass.models.base import Batch, Model
from tdpass.passes.slicing import ROUNDING, few_samples, why_no_slicing
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.streams import Basis, find_bases, find_streams, sliced
from tdpass.planner.streams.slicing import LEAST
from tdpass.planner.trials import Promise, gap
from tdpass.planner.widths import Widths, checked_share


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
        checked_share(self.keep, "params=0.8")
        job.expected = job.expected or 0.0
        why = why_no_slicing(model, job)
        if why:
            job.note(f"skipped: {why}")
            return False
        example = few_samples(model, job)
        streams = find_streams(model.record(example))
        for reason in streams.reasons():
            job.note(f"a stream keeps its coordinates: {reason}")
        bases = find_bases(streams, job.tapes(model)) if streams.turning() else {}
        most = max((basis.width for basis in bases.values()), default=LEAST)
        narrow = partial(_slice, example, bases)
        widths = Widths(model, example, narrow, most, LEAST, self.name, "streams")
        why = _why_not_at(widths, self.keep) if bases else "no stream that norms read may turn"
        if why:
            job.note(f"left as it was: {why}")
            return False
        keep = widths.largest(Budget.parse(self.bounds), job.original) if self.bounds else self.keep
        before = {site.name: site for site in model.sites()}
        narrow(model, keep)
        job.rewritten(model, before)
        sizes = sorted({basis.width for basis in bases.values()})
        job.note(
            f"{len(bases)} streams of {', '.join(map(str, sizes))} channels keep {keep:.3g} of them; "
            f"divergence {job.lost:.4g}"
        )
        return True


def _why_not_at(widths: Widths, keep: float) -> str:
    """Why the model cannot be sliced: at full width it differs, or at that width it does not run."""
    answer = widths.model.run(widths.example)
    try:
        moved = gap(answer, widths.at(1.0).run(widths.example))
        widths.at(min(keep, 0.5)).run(widths.example)
    except (InvalidModelError, UnsupportedError) as error:
        return f"it does not run in fewer channels: {error}"
    return f"rotated, it answers otherwise by {moved:.2g} of its outputs' size" if moved > ROUNDING else ""


def _slice(example: Batch, bases: Mapping[int, Basis], model: Model, keep: float) -> None:
    assert isinstance(model, SlicesStreams)
    model.slice_streams(sliced(find_streams(model.record(example)), bases, keep))
