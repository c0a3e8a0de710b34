"""recalibrate-batchnorm: estimate the running statistics of the batch-norms that are left."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.job import Job
from tdpass.models.abilities import RecalibratesBatchNorm
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.trials import Promise


@register_pass
@dataclass(frozen=True)
class RecalibrateBatchnorm(Pass):
    """Running means and variances anew from `augmented=` data, or else from the calibration data.

    Undone when the divergence from the original grows: statistics learned on augmented images are often
    better than those of a few clean ones.
    """

    name = "recalibrate-batchnorm"
    promise = Promise.REPAIR

    def run(self, model: Model, job: Job) -> bool:
        if not isinstance(model, RecalibratesBatchNorm):
            job.note(
                f"skipped: statistics of models that came through {model.frontend} cannot be estimated anew"
            )
            return False
        if not job.batches:
            job.note("skipped: there is no calibration data")
            return False
        before = _divergence(model, job)
        undo = model.recalibrate_batchnorm(job.batches if job.augmented is None else job.augmented)
        if undo is None:
            job.note("no batch-norm is left")
            return False
        after = _divergence(model, job)
        if not after < before:
            undo()
            job.note(f"left as it was: the divergence would go from {before:.4g} to {after:.4g}")
            return False
        job.note(f"divergence {before:.4g} -> {after:.4g}")
        return True


def _divergence(model: Model, job: Job) -> float:
    outputs = (job.fitted_divergence.outputs(model.run(batch)) for batch in job.batches)
    return job.fitted_divergence.mean(zip(job.references, outputs, strict=True))
