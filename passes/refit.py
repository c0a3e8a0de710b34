"""refit: solve each last factor again, on the compressed network's own activations."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.job import Job
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.repair import divergence_of, refit_last_factors, with_room_for_bias
from tdpass.planner.trials import Promise


@register_pass
@dataclass(frozen=True)
class Refit(Pass):
    """Refit the last factor and bias of replaced sites, front to back, towards the original's outputs.

    It is done by ridge least squares.

    Residual sums are included, so a layer also repairs what the layers before it lost.  Undone when the
    divergence of the network's output on the calibration data grows.  `ridge` pulls towards the factor as it
    was, relative to its features' power.
    """

    name = "refit"
    promise = Promise.REPAIR

    ridge: float = 1e-3

    def run(self, model: Model, job: Job) -> bool:
        layers = model.replaced()
        if not layers or not job.batches:
            job.note(
                "nothing to refit: no site is replaced"
                if job.batches
                else "skipped: there is no calibration data"
            )
            return False
        tapes, biased = job.tapes(model), with_room_for_bias(layers, job.room(model))
        refitted, declined = refit_last_factors(tapes, layers, self.ridge, biased, model.weight)
        before, after = (divergence_of(tapes, choice, job.fitted_divergence) for choice in (layers, refitted))
        if not after < before:
            job.note(f"left as it was: the divergence would go from {before:.4g} to {after:.4g}")
            return False
        for name, layer in refitted.items():
            if name not in declined:
                model.replace(name, layer)
        for name, reason in declined.items():
            job.note(f"{name} not refitted: {reason}")
        if left := layers.keys() - biased:
            job.note(f"{len(left)} sites get no bias: the budget has no room for one")
        job.note(f"divergence {before:.4g} -> {after:.4g}")
        return True
