"""fuse-kernels: each factored layer becomes one operator where that is faster."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.clock import threads_of_torch
from tdpass.fusing.choose import choosing
from tdpass.job import Job
from tdpass.models.abilities import FusesChains
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.trials import Promise


@register_pass
@dataclass(frozen=True)
class FuseKernels(Pass):
    """Run the layers that a factored layer is made of as one operator, where that is measured to be faster.

    Measured on the calibration data cut to the job's batch, else on the model's example.  The last pass of a
    pipeline: the result computes what it did, up to rounding where the numbers of layers say so, and is saved
    as before; an ONNX model runs anywhere, fused where the operator library is registered. `lanes`
    ("channels", "pixels"; "auto": the faster) and `measure` (false: fuse whatever can be) are for torch
    models.
    """

    name = "fuse-kernels"
    promise = Promise.SAME

    lanes: str = "auto"
    measure: bool = True

    def run(self, model: Model, job: Job) -> bool:
        if not isinstance(model, FusesChains):
            job.note(f"nothing is fused: models that came through {model.frontend} have no fused operators")
            return False
        if job.target is not None and not job.target.here:
            job.note(f"nothing is fused: target {job.target.name} is not this machine")
            return False
        with choosing(self.lanes, measure=self.measure), threads_of_torch(job.threads):
            changed = model.fuse(job.note, job.report.decline, job.one_call(model))
            job.note_recurrent(model)
            return changed
