"""smooth: what layers read is made easier to round, and their weights harder, where that pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.job import Job
from tdpass.kinds import kind_of
from tdpass.models.abilities import ScalesNorms
from tdpass.models.base import Model
from tdpass.numbers import numbers_named
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.smoothing import smoothed
from tdpass.planner.trials import Promise
from tdpass.site import Site
from tdpass.tape import Tape

_ROWS = 512


@register_pass
@dataclass(frozen=True)
class Smooth(Pass):
    """Divide what a norm makes by a scale per channel, multiply the columns of its readers (SmoothQuant).

    Its readers are the layers that read what the norm makes.

    How far is chosen on the calibration data, norm by norm, by the error of the outputs when activations are
    rounded to eight bits and weights to `numbers`; a norm stays as it is where nothing pays.  The output does
    not change. Before `quantize` and `quantize-activations`, and before anything that replaces layers.
    """

    name = "smooth"
    promise = Promise.SAME

    numbers: str = "int8"

    def run(self, model: Model, job: Job) -> bool:
        numbers = numbers_named(self.numbers)
        if not job.batches:
            job.note("skipped: there is no calibration data")
            return False
        if not isinstance(model, ScalesNorms):
            job.note(f"skipped: norms of models that came through {model.frontend} cannot be scaled")
            return False
        norms = model.norms(job.report.decline)
        assert isinstance(model, Model)
        sites = {site.name: site for site in model.sites()}
        rows = _rows(job.tapes(model), {names[0]: sites[names[0]] for names in norms.values()})
        done = 0
        for norm, names in norms.items():
            weights = [model.weight(name).double() for name in names]
            found = smoothed(rows[names[0]], weights, numbers) if names[0] in rows else None
            if found is None:
                job.report.decline(norm, "not smoothed: no scale makes rounding lose less")
                continue
            model.scale_norm(norm, found.scale)
            job.note(
                f"{norm}: alpha {found.alpha:g}, error {found.error / (found.before or 1.0):.3g} of before"
            )
            done += 1
        if done:
            job.recorded.clear()  # they hold the weights as they were
        job.note(f"smoothed {done} of {len(norms)} norms")
        return bool(done)


@dataclass
class _Reading:
    """Keeps some rows of what sites read, evenly over the runs."""

    sites: Mapping[str, Site]
    share: int
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        if name in self.sites:
            site, generator = self.sites[name], torch.Generator().manual_seed(len(self.rows.get(name, ())))
            found = kind_of(site).rows(x.detach(), site, self.share, generator)
            self.rows.setdefault(name, []).append(found.double())
        return y


def _rows(tapes: Sequence[Tape], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    reading = _Reading(sites, max(1, _ROWS // max(len(tapes), 1)))
    with torch.no_grad():
        for tape in tapes:
            tape.play().finish(reading)
    return {name: torch.cat(found) for name, found in reading.rows.items()}
