"""What passes that store a dense model in fewer channels have in common."""

from __future__ import annotations

from tdpass.job import Job
from tdpass.models.abilities import SlicesStreams
from tdpass.models.base import Batch, Model

ROUNDING = 1e-3  # how far rotated weights may answer otherwise


def few_samples(model: Model, job: Job) -> Batch:
    """Samples enough to follow what a run does with each channel."""
    return job.batches[0].part(0, 2) if job.batches[0].divisible else model.example() or job.batches[0]


def why_no_slicing(model: Model, job: Job) -> str:
    """Why a model cannot be narrowed at all; empty where it can."""
    if not job.batches:
        return "there is no calibration data"
    if not isinstance(model, SlicesStreams):
        return f"a model of {model.frontend} cannot be changed so"
    if any(model.layer(site.name) is not None for site in model.sites()):
        return "some layers are replaced already; it comes before passes that do that"
    return ""
