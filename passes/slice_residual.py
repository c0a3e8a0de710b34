"""slice-residual: residual streams rotated to their principal directions, and stored in fewer of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from tdpass.errors import InvalidModelError, UnsupportedError, UsageError
from tdpass.job import Job
from tdpass.models.abilities import SlicesStreams
from tdpass.models.base import Batch, Model
from tdpass.passes.slicing import ROUNDING, Slices, Slicing, cause_of
from tdpass.pipeline import register_pass
from tdpass.planner.streams import Basis, find_bases, find_streams, sliced
from tdpass.planner.streams.slicing import LEAST
from tdpass.planner.trials import gap
from tdpass.planner.widths import Widths

_BASES = ("network", "block")


@register_pass
@dataclass(frozen=True)
class SliceResidual(Slicing):
    """Store the streams between norms in fewer channels (SliceGPT): a narrower dense network.

    `keep` is the share of channels that is left; with a budget among the options (`params=0.8`) it is the
    largest that meets it.  Scales, shifts and the subtraction of means become part of the layers around a
    norm.  Where a norm's output is added to again, or returned, an adapter is put behind the norm.  The model
    at full width is held against the original before anything is left out.  Comes before `plan`, which then
    sees the narrower network.  With `bases=block` every residual sum of what a norm reads begins a basis of
    its own, and that summand goes through a small shortcut from one to the next; else a stream has one basis
    from end to end (`network`).
    """

    name = "slice-residual"
    instead = "params=0.8"

    bases: str = "network"

    def slices(self, model: Model, example: Batch, job: Job) -> Slices | str:
        if self.bases not in _BASES:
            raise UsageError(
                f"bases={self.bases!r} is not known to {self.name}; it is one of {', '.join(_BASES)}"
            )
        apart = self.bases == "block"
        streams = find_streams(model.record(example), apart=apart)
        for reason in streams.reasons():
            job.note(f"a stream keeps its coordinates: {reason}")
        bases = find_bases(streams, job.tapes(model)) if streams.turning() else {}
        if not bases:
            return "no stream that norms read may turn"
        if apart and not streams.sums:
            job.note("no shortcut is needed: behind every sum comes a norm, and a basis of its own")
        most = max(basis.width for basis in bases.values())
        narrow = partial(_slice, example, bases, apart)
        widths = Widths(model, example, narrow, most, LEAST, self.name, "streams")
        why = _why_not_at(widths, self.keep)
        if why:
            return why
        sizes = sorted({basis.width for basis in bases.values()})
        what = f"{len(bases)} streams of {', '.join(map(str, sizes))} channels"
        what += f", {len(streams.sums)} shortcuts between them," if streams.sums else ""
        return Slices(widths, what, "them")


def _why_not_at(widths: Widths, keep: float) -> str:
    """Why the model cannot be sliced: at full width it differs, or at that width it does not run."""
    answer = widths.model.run(widths.example)
    try:
        moved = gap(answer, widths.at(1.0).run(widths.example))
        widths.at(min(keep, 0.5)).run(widths.example)
    except (InvalidModelError, UnsupportedError) as error:
        return f"it does not run in fewer channels: {cause_of(error)}"
    return f"rotated, it answers otherwise by {moved:.2g} of its outputs' size" if moved > ROUNDING else ""


def _slice(example: Batch, bases: Mapping[int, Basis], apart: bool, model: Model, keep: float) -> None:
    assert isinstance(model, SlicesStreams)
    model.slice_streams(sliced(find_streams(model.record(example), apart=apart), bases, keep))
