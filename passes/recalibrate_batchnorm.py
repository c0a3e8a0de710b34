"""recalibrate-batchnorm: estimate the running statistics of the batch-norms that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tdpass.models.base import Batch, Model
from tdpass.pipeline import Job, Pass, register_pass


@register_pass
@dataclass(frozen=True)
class RecalibrateBatchnorm(Pass):
    """Running means and variances anew from `augmented=` data, or else from the calibration data.

    Undone when the divergence from the original grows: statistics learned on augmented images are often better than those
    of a few clean ones.
    """

    name = "recalibrate-batchnorm"

    def run(self, model: Model, job: Job) -> bool:
        if not job.batches:
            job.note("skipped: there is no calibration data")
            return False
        references = job.references(model)
        before = _divergence(model, job, references)
        undo = model.recalibrate_batchnorm(job.batches if job.augmented is None else job.augmented)
        if undo is None:
            job.note("no batch-norm is left")
            return False
        after = _divergence(model, job, references)
        if not after < before:
            undo()
            job.note(f"left as it was: the divergence would go from {before:.4g} to {after:.4g}")
            return False
        job.note(f"divergence {before:.4g} -> {after:.4g}")
        return True


def _divergence(model: Model, job: Job, references: Sequence[torch.Tensor]) -> float:
    def of(batch: Batch, reference: torch.Tensor) -> torch.Tensor:
        return job.divergence(reference, job.divergence.output(model.run(batch)).reshape(reference.shape))

    values = torch.cat([of(batch, reference) for batch, reference in zip(job.batches, references, strict=True)])
    return float(values.mean())
