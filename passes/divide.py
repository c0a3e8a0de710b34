"""divide: query, key and value that one weight makes become layers of their own."""

from __future__ import annotations

from dataclasses import dataclass

from tdpass.job import Job
from tdpass.models.abilities import DividesLayers
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.trials import Promise


@register_pass
@dataclass(frozen=True)
class Divide(Pass):
    """y = [W_1 x + b_1, W_2 x + b_2, ...] for y = W x + b, where what follows reads these slices of y apart.

    So each slice has a rank of its own. `factorize` makes whole again what none of whose slices it replaced.
    The output does not change.
    """

    name = "divide"
    promise = Promise.SAME

    def run(self, model: Model, job: Job) -> bool:
        if not isinstance(model, DividesLayers):
            job.note(f"skipped: layers of models that came through {model.frontend} cannot be divided")
            return False
        before, whole = model.declined(), dict[str, str]()
        divided = model.divide(whole.__setitem__)
        names = {site.name for site in model.sites()}
        for name, reason in whole.items():
            if name in names:  # it is a site as it is
                job.note(f"{name} is {reason}")
            else:
                job.report.decline(name, reason)
        for name in before.keys() - model.declined().keys():
            job.report.declined.pop(name, None)
        job.note(f"divided {len(divided)} layers into slices of their weights")
        return bool(divided)
