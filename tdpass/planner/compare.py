"""Comparing two networks' outputs on the same data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.planner.comparisons import Comparison
from tdpass.planner.divergence import FittedDivergence, Outputs, Tally


@dataclass
class _Differences:
    """Sums over the calls of one output."""

    comparison: Comparison
    gap: float = 0.0
    power: float = 0.0
    largest_gap: float = 0.0
    largest: float = 0.0
    same: int = 0
    decisions: int = 0
    by_channel: Tensor | None = None
    elements: int = 0

    def add(self, reference: Tensor, output: Tensor) -> None:
        if not reference.numel():
            return
        difference = reference - output
        self.gap += float(difference.square().sum())
        self.power += float(reference.square().sum())
        self.largest_gap = float(torch.tensor(self.largest_gap).double().maximum(difference.abs().max()))
        self.largest = max(self.largest, float(reference.abs().max()))
        classes = self.comparison.classes
        if classes is not None:
            agree = reference.argmax(classes) == output.argmax(classes)
            self.same += int(agree.sum())
            self.decisions += agree.numel()
        means = self.comparison.by_channel(reference, output)
        if means is not None and (self.by_channel is None or means.shape == self.by_channel.shape):
            squares = means * reference.numel()
            self.by_channel = squares if self.by_channel is None else self.by_channel + squares
            self.elements += reference.numel()

    def checks(self) -> dict[str, float]:
        """What is largest over outputs where there are several."""
        return {
            "relative_difference": self.gap**0.5 / max(self.power**0.5, 1e-30),
            "max_difference": self.largest_gap / max(self.largest, 1e-30),
        }

    def worst_channel(self) -> tuple[int, float] | None:
        """The channel whose error is largest relative to its spread, and its mean square."""
        if self.by_channel is None:
            return None
        return int(self.by_channel.argmax()), float(self.by_channel.max()) / self.elements


def compare_outputs(
    pairs: Iterable[tuple[Outputs, Outputs]], divergence: FittedDivergence, samples: int
) -> dict[str, float]:
    """Divergence, relative and largest difference, and, of class scores, how often both pick the same class.

    `relative_difference` is ||a - b|| / ||a|| over all calls, `max_difference` the largest |a - b| over the
    largest |a|. Of several outputs the worst is given, and each by name: `divergence[boxes]`.  `samples` is
    how many the calls hold. `worst_channel[boxes.3]` is the mean squared error of the channel where that is
    largest, relative to its spread.
    """
    tally, compared = Tally(divergence), dict[str, _Differences]()
    for reference, outputs in pairs:
        tally.add(reference, outputs)
        for name, ours, theirs in divergence.pairs(reference, outputs):
            compared.setdefault(name, _Differences(divergence.comparisons[name].comparison)).add(ours, theirs)
    each = {name: {"divergence": tally.means[name], **found.checks()} for name, found in compared.items()}
    checks = {
        "divergence": tally.mean,
        "relative_difference": _worst([found["relative_difference"] for found in each.values()]),
        "max_difference": _worst([found["max_difference"] for found in each.values()]),
        "samples": float(samples),
    }
    same = {name: found.same / found.decisions for name, found in compared.items() if found.decisions}
    if same:
        checks["same_class"] = min(same.values())
    if len(each) > 1:
        checks |= {
            f"{entry}[{name}]": value for name, found in each.items() for entry, value in found.items()
        }
        checks |= {f"same_class[{name}]": value for name, value in same.items()}
    for name, found in compared.items():
        worst = found.worst_channel()
        if worst is not None:
            label = f"{name}.{worst[0]}" if len(each) > 1 else str(worst[0])
            checks[f"worst_channel[{label}]"] = worst[1]
    return checks


def _worst(values: Sequence[float]) -> float:
    """The largest; NaN where one is."""
    return float(torch.tensor(values, dtype=torch.float64).max())
