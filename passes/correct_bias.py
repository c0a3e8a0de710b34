"""correct-bias: restore each replaced site's mean output on the calibration data."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.models.base import Model
from tdpass.pipeline import Job, Pass, register_pass
from tdpass.planner.repair import correct_biases, divergence_of


@register_pass
@dataclass(frozen=True)
class CorrectBias(Pass):
    """b += E[y_dense - y_compressed], front to back on the compressed network's own activations.

    Undone when the divergence of the network's output on the calibration data grows.
    """

    name = "correct-bias"

    def run(self, model: Model, job: Job) -> bool:
        layers = {site.name: layer for site in model.sites() if (layer := model.layer(site.name)) is not None}
        if not layers or not job.batches:
            job.note("nothing to correct: no site is replaced" if job.batches else "skipped: there is no calibration data")
            return False
        tapes = job.tapes(model)
        corrected = correct_biases(tapes, layers)
        divergence = job.measure(model)
        before, after = (divergence_of(tapes, choice, divergence) for choice in (layers, corrected))
        if not after < before:
            job.note(f"left as it was: the divergence would go from {before:.4g} to {after:.4g}")
            return False
        for name, layer in corrected.items():
            model.replace(name, layer)
        job.note(f"divergence {before:.4g} -> {after:.4g}")
        return True
