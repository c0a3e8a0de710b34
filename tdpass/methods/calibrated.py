"""What a method learns from calibration data before it trains.

Metrics of its sites, and the dense model's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tdpass.following import Progress, silent
from tdpass.formats.metric import Metric
from tdpass.models.base import Model
from tdpass.models.batch import Batch
from tdpass.planner.divergence import Divergence
from tdpass.planner.moments import stream_metrics
from tdpass.site import Site
from tdpass.training.calls import class_scores


def metrics_of(
    model: Model, sites: Sequence[Site], batches: Sequence[Batch], progress: Progress = silent
) -> dict[str, Metric]:
    """The metric of each site on these calls.

    Second moments of what it reads, and what its output means to the network's.
    """
    wish = Divergence()
    divergence = wish.fit([wish.outputs(model.run(batch)) for batch in batches])
    tapes = [model.record(batch) for batch in batches]
    tick = partial(progress, "reading calibration data")
    found = {site.name: metric for site, metric in stream_metrics(tapes, sites, divergence, tick)}
    return {site.name: found.get(site.name, Metric()) for site in sites}


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
