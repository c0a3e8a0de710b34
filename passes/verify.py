"""verify: run the compressed model and compare it with the original."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tdpass.errors import TdpassError, UnsupportedError
from tdpass.job import Job
from tdpass.models import open_model
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.compare import compare_outputs
from tdpass.planner.trials import Promise


@register_pass
@dataclass(frozen=True)
class Verify(Pass):
    """Run the model as it is given back on the calibration data and report how far it is from the original.

    The original is the model as it was given.

    Raises `DifferenceError` when an output is not finite, when the divergence is above `limit`, or, where
    none is set, above what the plan expects.
    """

    name = "verify"
    promise = Promise.SAME

    limit: float = math.inf

    def run(self, model: Model, job: Job) -> bool:
        model.check()
        if not job.batches:
            job.note("checked the structure; pass data= to compare outputs")
            return False
        result = open_model(model.unwrap())
        try:
            outputs = [job.fitted_divergence.outputs(result.run(batch)) for batch in job.batches]
        except UnsupportedError as error:
            job.report.note(
                "the result cannot be run here as it is deployed, so it was not compared with the "
                f"original: {error}"
            )
            return False
        except TdpassError as error:
            job.unexpected(f"the result does not run on the calibration data, as the original does: {error}")
            return False
        try:
            checks = compare_outputs(
                zip(job.references, outputs, strict=True),
                job.fitted_divergence,
                sum(batch.size for batch in job.batches),
            )
        except Exception as error:  # noqa: BLE001 - a comparison that cannot be made must not cost the result
            job.report.note(
                f"the outputs could not be compared with the original's: {type(error).__name__}: {error}"
            )
            return False
        job.report.checks.update(checks)
        job.note(", ".join(f"{name} {value:.4g}" for name, value in checks.items()))
        self._judge(checks, job)
        return False

    def _judge(self, checks: dict[str, float], job: Job) -> None:
        assert job.trials is not None, "a pipeline has begun"
        found, culprit = checks["divergence"], job.trials.culprit()
        blame = f"; the pass {culprit} did most of it" if culprit else ""
        if not math.isfinite(checks["relative_difference"]):
            job.unexpected(f"the compressed model answers with NaN or infinite values{blame}")
        elif self.limit < math.inf and found > self.limit:
            job.unexpected(
                f"the divergence {found:.4g} is above the limit {self.limit:g}{blame}; raise the budget or "
                "the limit"
            )
        elif self.limit == math.inf and job.expected is not None and found > job.trials.allowed(job.expected):
            job.unexpected(
                f"the divergence {found:.4g} from the original is more than ten times the "
                f"{job.expected:.4g} that the plan expects{blame}"
            )
