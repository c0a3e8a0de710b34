"""quantize-activations: what layers of integer weights read and make is held in eight bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tdpass.errors import UnsupportedError, UsageError
from tdpass.form import DYNAMIC
from tdpass.job import Job
from tdpass.models.abilities import HoldsIntegerActivations, Range
from tdpass.models.base import Model
from tdpass.pipeline import Pass, register_pass
from tdpass.planner.calibrations import BINS, CALIBRATIONS, Histogram
from tdpass.planner.effort import first_batches, said_of_few
from tdpass.planner.integer_activations import (
    ranges_on,
    reading_integers,
    with_ranges,
)
from tdpass.planner.repair import divergence_of
from tdpass.planner.trials import Promise

_SAMPLES = 64


@register_pass
@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Hold in eight bits, with one scale and zero point each, what layers of int8 weights read.

    In ONNX also what they make and what joins such.

    Ranges come from the calibration data: `calibration` is `minmax` (all that was seen), `percentile` (all
    but one number in ten thousand), `mse` (least squared error) or `kl` (least divergence of the
    distribution); or it is `dynamic`, and linear layers find ranges in every call, from each row on torch and
    from all of it in ONNX.  Of the layers, the share `keep` whose activations cost most, measured one by one
    as the divergence of the output, stays as it is.  Runs after `quantize`, as the last pass but
    `fuse-kernels`, on torch, and `verify`.
    """

    name = "quantize-activations"
    promise = Promise.NONE  # a replay knows nothing of it; `verify` holds the result to what is measured here

    calibration: str = "percentile"
    keep: float = 0.0

    def run(self, model: Model, job: Job) -> bool:
        if not 0 <= self.keep < 1:
            raise UsageError(f"keep={self.keep} is no share of layers; give one of at least 0 and below 1")
        if self.calibration != DYNAMIC:
            CALIBRATIONS.get(self.calibration)
        else:
            return self._by_layer(model, job, "dynamic")
        if not job.batches:
            job.note("skipped: there is no calibration data")
            return False
        if few := said_of_few(job.batches, "ranges"):
            job.note(few)
        if not isinstance(model, HoldsIntegerActivations):
            return self._by_layer(model, job, "static")
        if model.held_integers():
            job.note("skipped: activations are integers already")
            return False
        layers = model.integer_layers()
        if not layers:
            job.note("skipped: no layer has int8 weights; put quantize before it")
            return False
        ranges = self._ranges(model, model.activations(), job)
        kept = self._sensitive(model, layers, ranges, job) if self.keep else []
        wanted = set(model.activations(kept))
        model.hold_integers({name: found for name, found in ranges.items() if name in wanted})
        assert isinstance(model, Model)
        found = _divergence(model, job, len(job.batches))
        job.expected = max(job.expected or 0.0, found)
        job.note(
            f"{len(wanted)} tensors of {len(layers) - len(kept)} layers are held in eight bits; divergence "
            f"{found:.4g}"
        )
        return bool(wanted)

    def _by_layer(self, model: Model, job: Job, how: Literal["dynamic", "static"]) -> bool:
        """Let layers round what they read, each for itself."""
        present = model.replaced()
        if any(layer.form.activations for layer in present.values()):
            job.note("skipped: activations are integers already")
            return False
        made, tapes = reading_integers(present, how), job.tapes(model) if job.batches else []
        if how == "static":
            ranges = ranges_on(tapes, present, made, self.calibration)
            made = {name: with_ranges(made[name], found) for name, found in ranges.items()}
        reasons = {name: model.refused(layer.form) for name, layer in made.items()}
        for name, reason in reasons.items():
            if reason:
                job.report.decline(name, f"its activations stay as they are: {reason}")
        made = {name: layer for name, layer in made.items() if not reasons[name]}
        if not made:
            job.note("skipped: no layer that may has int8 weights; put quantize before it")
            return False
        few = tapes[: len(first_batches(job.batches, _SAMPLES))]
        losses = {
            name: divergence_of(few, {**present, name: layer}, job.fitted_divergence)
            for name, layer in (made.items() if self.keep and few else ())
        }
        kept = self._kept(losses, len(made), job)
        for name in [name for name in made if name not in kept]:
            model.replace(name, made[name])
        job.note(f"{len(made) - len(kept)} layers read integers of eight bits, {how} ranges")
        if job.batches:
            job.expected = max(job.expected or 0.0, _divergence(model, job, len(job.batches)))
            job.note(f"divergence {job.expected:.4g}")
        return len(made) > len(kept)

    def _ranges(self, model: HoldsIntegerActivations, names: Sequence[str], job: Job) -> dict[str, Range]:
        ends: dict[str, tuple[float, float]] = dict.fromkeys(names, (0.0, 0.0))
        for batch in job.batches:
            for name, value in model.watch(names, batch).items():
                if name in ends:
                    ends[name] = (
                        min(ends[name][0], float(value.min())),
                        max(ends[name][1], float(value.max())),
                    )
                    if not all(map(math.isfinite, ends[name])) or bool(value.isnan().any()):
                        raise UnsupportedError(
                            f"the tensor {name!r} is NaN or infinite on the calibration data, so it has no "
                            "range; leave such samples out"
                        )
        if self.calibration == "minmax":
            return {name: Range(*found) for name, found in ends.items()}
        seen = {
            name: Histogram(low, high, np.zeros(BINS)) for name, (low, high) in ends.items() if high > low
        }
        for batch in job.batches:
            for name, value in model.watch(list(seen), batch).items():
                if name in seen:
                    seen[name].add(value.numpy())
        choose = CALIBRATIONS.get(self.calibration)
        return {name: Range(*(choose(seen[name]) if name in seen else ends[name])) for name in names}

    def _sensitive(
        self, model: HoldsIntegerActivations, layers: Sequence[str], ranges: Mapping[str, Range], job: Job
    ) -> list[str]:
        """The layers whose activations cost most when they alone are integers."""
        assert isinstance(model, Model)
        few = len(first_batches(job.batches, _SAMPLES))
        losses: dict[str, float] = {}
        for count, layer in enumerate(layers):
            job.progress("measuring layers with integer activations", count, len(layers))
            alone = set(model.activations([other for other in layers if other != layer]))
            model.hold_integers({name: found for name, found in ranges.items() if name in alone})
            losses[layer] = _divergence(model, job, few)
        return self._kept(losses, len(layers), job)

    def _kept(self, losses: Mapping[str, float], count: int, job: Job) -> list[str]:
        """Of so many layers those that stay as they are."""
        kept = sorted(losses, key=lambda layer: -losses[layer])[: round(self.keep * count)]
        for layer in kept:
            job.report.decline(
                layer,
                "its activations stay as they are: in eight bits they alone cost a divergence of "
                f"{losses[layer]:.2g}",
            )
        return kept


def _divergence(model: Model, job: Job, count: int) -> float:
    """From the original, of the model as it really runs, on the first calls of the calibration data."""
    measure = job.fitted_divergence
    pairs = zip(job.references[:count], job.batches[:count], strict=True)
    return measure.mean([(reference, measure.outputs(model.run(batch))) for reference, batch in pairs])
