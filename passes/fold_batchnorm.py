"""fold-batchnorm: batch-norm after a convolution or linear layer becomes part of its weight and bias."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.job import Job
from tdpass.models.abilities import FoldsBatchNorm
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.trials import Promise


@register_pass
@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """W' = gamma / sqrt(var + eps) W, b' = beta + gamma (b - mean) / sqrt(var + eps).

    The output in inference does not change.
    """

    name = "fold-batchnorm"
    promise = Promise.SAME

    def run(self, model: Model, job: Job) -> bool:
        if not isinstance(model, FoldsBatchNorm):
            job.note(f"skipped: batch-norms of models that came through {model.frontend} cannot be folded")
            return False
        folded = model.fold_batchnorm(job.report.decline)
        job.note(f"folded {len(folded)} of {len(model.sites())} sites' batch-norms")
        return bool(folded)
