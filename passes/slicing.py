"""What passes that store a dense model in fewer channels have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from tdpass.cost import Budget, BudgetValue, bounded
from tdpass.job import Job
from tdpass.models.abilities import SlicesStreams
from tdpass.models.base import Batch, Model, few_samples
from tdpass.pipeline import Pass
from tdpass.planner.trials import Promise
from tdpass.planner.widths import Widths, checked_share

ROUNDING = 1e-3  # how far rotated weights may answer otherwise


def cause_of(error: Exception) -> str:
    """What a narrower network failed with, without advice on how to call the one that was given."""
    cause = error.__cause__
    return str(error) if cause is None else f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"


@dataclass(frozen=True)
class Slices:
    """What can be left out of a model; in the report `what` keep a share of `channels`."""

    widths: Widths
    what: str
    channels: str


@dataclass(frozen=True)
class Slicing(Pass, ABC):
    """A pass that leaves a share `keep` of channels, or the largest that is within a budget.

    `instead` is an example of a budget.
    """

    promise = Promise.PLAN

    gathers = MappingProxyType({"bounds": bounded})
    instead: ClassVar[str]

    bounds: Mapping[str, BudgetValue] = field(default_factory=dict)
    keep: float = 0.75

    @abstractmethod
    def slices(self, model: Model, example: Batch, job: Job) -> Slices | str:
        """What of the model can be left out, or why nothing can; the model stays as it is."""

    def run(self, model: Model, job: Job) -> bool:
        checked_share(self.keep, self.instead)
        job.expected = job.expected or 0.0
        why = _why_no_slicing(model, job)
        if why:
            job.note(f"skipped: {why}")
            return False
        found = self.slices(model, few_samples(model, job.batches), job)
        if isinstance(found, str):
            job.note(f"left as it was: {found}")
            return False
        widths = found.widths
        keep = widths.largest(Budget.parse(self.bounds), job.original) if self.bounds else self.keep
        before = {site.name: site for site in model.sites()}
        widths.narrow(model, keep)
        job.rewritten(model, before)
        job.note(f"{found.what} keep {keep:.3g} of {found.channels}; divergence {job.lost:.4g}")
        return True


def _why_no_slicing(model: Model, job: Job) -> str:
    """Why a model cannot be narrowed at all; empty where it can."""
    if not job.batches:
        return "there is no calibration data"
    if not isinstance(model, SlicesStreams):
        return f"a model of {model.frontend} cannot be changed so"
    if any(model.layer(site.name) is not None for site in model.sites()):
        return "some layers are replaced already; it comes before passes that do that"
    return ""
