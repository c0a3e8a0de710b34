"""verify: run the compressed model and compare it with the original."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tdpass.errors import TdpassError
from tdpass.models.base import Model
from tdpass.pipeline import Job, Pass, register_pass
from tdpass.planner.compare import compare_outputs


@register_pass
@dataclass(frozen=True)
class Verify(Pass):
    """Run the model as it is deployed on the calibration data and report how far it is from the original.

    Raises `TdpassError` when the divergence is above `limit`, or when an output is not finite.
    """

    name = "verify"

    limit: float = math.inf

    def run(self, model: Model, job: Job) -> bool:
        model.check()
        if not job.batches:
            job.note("checked the structure; pass data= to compare outputs")
            return False
        divergence = job.measure(model)
        outputs = (divergence.outputs(model.run(batch)) for batch in job.batches)
        checks = compare_outputs(zip(job.references(model), outputs, strict=True), divergence, sum(batch.size for batch in job.batches))
        job.report.checks.update(checks)
        if not math.isfinite(checks["relative_difference"]):
            raise TdpassError("the compressed model answers with NaN or infinite values; exclude the sites with the largest errors, or raise the budget")
        if checks["divergence"] > self.limit:
            raise TdpassError(f"the divergence {checks['divergence']:.4g} is above the limit {self.limit:g}; raise the budget or the limit")
        job.note(", ".join(f"{name} {value:.4g}" for name, value in checks.items()))
        return False
