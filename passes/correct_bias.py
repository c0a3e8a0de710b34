"""correct-bias: restore each replaced site's mean output on the calibration data."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.job import Job
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.repair import correct_biases, divergence_of, with_room_for_bias
from tdpass.planner.trials import Promise


@register_pass
@dataclass(frozen=True)
class CorrectBias(Pass):
    """b += E[y_dense - y_compressed], front to back on the compressed network's own activations.

    Undone when the divergence of the network's output on the calibration data grows.
    """

    name = "correct-bias"
    promise = Promise.REPAIR

    def run(self, model: Model, job: Job) -> bool:
        layers = model.replaced()
        if not layers or not job.batches:
            job.note(
                "nothing to correct: no site is replaced"
                if job.batches
                else "skipped: there is no calibration data"
            )
            return False
        tapes, biased = job.tapes(model), with_room_for_bias(layers, job.room(model))
        corrected = correct_biases(tapes, layers, biased)
        before, after = (
            divergence_of(tapes, choice, job.fitted_divergence) for choice in (layers, corrected)
        )
        if not after < before:
            job.note(f"left as it was: the divergence would go from {before:.4g} to {after:.4g}")
            return False
        for name, layer in corrected.items():
            model.replace(name, layer)
        if left := layers.keys() - biased:
            job.note(f"{len(left)} sites get no bias: the budget has no room for one")
        job.note(f"divergence {before:.4g} -> {after:.4g}")
        return True
