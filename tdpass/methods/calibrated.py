"""What a method learns from calibration data before it trains.

Metrics of its sites, what forms of these lose, and the dense model's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tdpass.following import Progress, silent
from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.models.base import Model
from tdpass.models.batch import Batch
from tdpass.planner.divergence import Divergence, FittedDivergence
from tdpass.planner.effort import EFFORTS
from tdpass.planner.moments import stream_metrics
from tdpass.planner.sensitivity import Sweep, measure_losses
from tdpass.site import Site
from tdpass.tape import Tape
from tdpass.training.calls import class_scores


def metrics_of(
    model: Model, sites: Sequence[Site], batches: Sequence[Batch], progress: Progress = silent
) -> dict[str, Metric]:
    """The metric of each site on these calls.

    Second moments of what it reads, and what its output means to the network's.
    """
    tapes, divergence = _recorded(model, batches)
    tick = partial(progress, "reading calibration data")
    found = {site.name: metric for site, metric in stream_metrics(tapes, sites, divergence, tick)}
    return {site.name: found.get(site.name, Metric()) for site in sites}


def _recorded(model: Model, batches: Sequence[Batch]) -> tuple[list[Tape], FittedDivergence]:
    """Runs of the model on these calls, and how far other outputs are from its own."""
    wish = Divergence()
    divergence = wish.fit([wish.outputs(model.run(batch)) for batch in batches])
    return [model.record(batch) for batch in batches], divergence


@dataclass(frozen=True)
class Tried:
    """Layers that may stand for that of a site, each made when it is asked for, and their relative errors."""

    layers: Sequence[Callable[[], Layer]]
    errors: Sequence[float]


def losses_of(
    model: Model, sites: Mapping[str, Tried], batches: Sequence[Batch], progress: Progress = silent
) -> dict[str, list[float]]:
    """KL(dense || network) with one site alone replaced by each of its layers.

    On as many samples, and for as many layers, as the planner has time for at its usual effort, counted in
    multiply-adds so that the same model has the same losses again; the rest follow from their errors.
    """
    effort = EFFORTS["normal"].of(model.macs())
    sweep = Sweep(*_recorded(model, batches), effort.for_losses(len(sites)))
    allowed = effort.for_candidates(len(sites), sweep.tried_on)
    found = {}
    for done, name in enumerate(sorted(sites, key=sweep.place)):
        progress("measuring what forms lose", done, len(sites))
        tried = [partial(_replaced, name, make) for make in sites[name].layers]
        losses = measure_losses(sweep, tried, sites[name].errors, allowed) if tried else []
        found[name] = [loss.value for loss in losses]
    progress("measuring what forms lose", len(sites), len(sites))
    return found


def _replaced(name: str, make: Callable[[], Layer]) -> dict[str, Layer]:
    return {name: make()}


@torch.no_grad()
def answers_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """The class scores that a model in evaluation answers each call with.

    Raises `UsageError` where it answers with none.
    """
    training = model.training
    model.eval()
    scores = [class_scores(model(*batch.args, **batch.kwargs)) for batch in batches]
    model.train(training)
    return scores
