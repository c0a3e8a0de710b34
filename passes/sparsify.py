"""sparsify: store a part of weights and factors, the rest being zero."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdpass.form import DENSE, Form
from tdpass.job import Job
from tdpass.models.base import Model
from tdpass.passes.project_channels import ProjectChannels
from tdpass.passes.stored import Stored
from tdpass.pipeline import register_pass
from tdpass.site import Site
from tdpass.supports import support_named
from tdpass.targets.base import Setting
from tdpass.targets.break_even import BreakEvenTable, open_break_even


@register_pass
@dataclass(frozen=True)
class Sparsify(Stored):
    """Keep a part of the entries of weights, or of the factors of replaced sites, such as `2:4`, `rows/50%`.

    Others are `unstructured/30%` and `blocks4x4/50%`.

    `rounding` says which are kept: those that cost most to do without when the others make up for them
    (`moments`), those of largest magnitude times that of what they are multiplied by (`activations`), or
    those of largest magnitude (`nearest`).  Sites that have a support already are left as they are, and with
    `break_even` (`cpu`, or `table:FILE.yaml`) those that run no faster with so many zeros on that machine.

    Layers that keep a share of their `rows`, or of their input `channels`, run as smaller dense layers.  With
    `fold` and calibration data, channels between layers that feed each other alone are left out of both, as
    `project-channels` does it; elsewhere inputs are gathered and outputs put in their places, where that
    takes less time than it saves.
    """

    name = "sparsify"

    support: str = "2:4"
    break_even: str = ""
    fold: bool = True

    def run(self, model: Model, job: Job) -> bool:
        done = self._folded(model, job) if self.fold and job.batches else frozenset()
        return self.store(model, job, done) or bool(done)

    def _folded(self, model: Model, job: Job) -> frozenset[str]:
        """Leave channels out of the layers on both of their sides.

        Returns the sites that need no support any more.
        """
        support = support_named(self.support)
        axes = {site.name: support.line(site.shape) for site in model.sites() if not model.layer(site.name)}
        if support.share is None or not any(axis is not None for axis in axes.values()):
            return frozenset()
        narrowing = ProjectChannels(
            how="norm" if self.rounding == "nearest" else "taylor", keep=support.share
        )
        if not narrowing.run(model, job):
            return frozenset()
        left = {choice.site: (choice.form.outputs, choice.form.inputs) for choice in job.plan or ()}
        return frozenset(
            name for name, axis in axes.items() if axis is not None and left[name][axis] is not None
        )

    def form(self, present: Form, site: Site) -> Form:
        text = str(support_named(self.support))
        return present if present.support else replace(present, support=text)

    def left_alone(self, site: Site, form: Form, model: Model, job: Job) -> str:
        if not self.break_even or form.format != DENSE.format:
            return ""
        support = support_named(self.support)
        machine = open_break_even(self.break_even, model.frontend, job.cache)
        setting = Setting(job.batch, job.threads, model.weight(site.name).dtype)
        if not site.seen and not isinstance(machine, BreakEvenTable):
            return f"it was not seen running, so {self.break_even} tells no break-even sparsity; give data"
        least, share = machine.break_even_sparsity(site, support.group, setting), support.sparsity(site.shape)
        if least is not None and share >= least:
            return ""
        pays = "with no share of zeros" if least is None else f"from {least:.0%} zeros on"
        return f"it has {share:.0%} zeros as '{form}', and is faster {pays} ({self.break_even})"
