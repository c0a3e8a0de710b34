"""A network put together from priced layers: what it was predicted to cost, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tdpass.artifact import Artifact
from tdpass.methods.tariff import Tariff
from tdpass.models.abilities import FusesChains
from tdpass.models.base import Model, call_batch
from tdpass.models.batch import Batch
from tdpass.site import Site
from tdpass.targets import Target
from tdpass.targets.layers import channels_last


@dataclass(frozen=True)
class Assembled:
    """The layers' prices, dense and as they were chosen, of a network that can be priced as a whole."""

    tariff: Tariff
    dense: Mapping[str, float]
    chosen: Mapping[str, float]

    def weigh(self, original: Model, artifact: Artifact, batch: Batch | None, yardstick: Site) -> None:
        """Say in the report what the whole was predicted to cost and what it is measured to.

        Predicted is the dense whole less what its layers save; on a target that times, both wholes are timed
        in turn, the new one with its factored layers fused where that is faster, on the scale of
        `yardstick`'s price.
        """
        measure, report, target = self.tariff.measure, artifact.report, self.tariff.target
        saved = sum(self.dense.values()) - sum(self.chosen.values())
        before, after = report.original.get(measure), report.final.get(measure)
        if target is not None:
            if batch is None:
                report.note(
                    f"the assembled network was not measured on {target.name}: there is nothing to call it "
                    "with"
                )
                return
            before, after = self._on_target(target, original, artifact, batch, yardstick)
        predicted = before - saved
        report.checks |= {f"predicted_{measure}": predicted, f"measured_{measure}": after}
        gap = (after - predicted) / predicted if predicted else 0.0
        said = f"{self.tariff.text(predicted)} predicted, {self.tariff.text(after)} measured ({gap:+.1%})"
        report.note(f"the assembled network: {said}; dense {self.tariff.text(before)}")
        if after > before:
            report.note(
                f"the assembled network costs more than the dense one: keep the dense network here, or search "
                f"with another batch than {self.tariff.setting.batch} or for another target"
            )

    def _on_target(
        self, target: Target, original: Model, artifact: Artifact, batch: Batch, yardstick: Site
    ) -> tuple[float, float]:
        """Amounts of the dense and of the assembled whole."""
        made, setting, report = artifact.opened.clone(), self.tariff.setting, artifact.report
        if target.here and isinstance(made, FusesChains):
            laid = batch.resized(setting.batch).map(channels_last)
            made.fuse(lambda text: None, lambda name, reason: None, laid)
        before, after = self.tariff.whole(
            target, [original, made], lambda: call_batch(original, [batch], setting.batch), yardstick
        )
        report.original = report.original.replace(
            **{measure: before.get(measure) for measure in target.measures}
        )
        report.final = report.final.replace(**{measure: after.get(measure) for measure in target.measures})
        report.target = (
            f"{target.name}, batch {setting.batch}, {setting.threads} "
            f"{'thread' if setting.threads == 1 else 'threads'}"
        )
        return before.get(self.tariff.measure), after.get(self.tariff.measure)
