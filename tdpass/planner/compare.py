"""Comparing two networks' outputs on the same data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdpass.planner.divergence import Divergence


def compare_outputs(pairs: Sequence[tuple[Tensor, Tensor]], divergence: Divergence) -> dict[str, float]:
    """Mean divergence, relative and largest difference, and, for class scores, how often both pick the same class.

    `relative_difference` is ||a - b|| / ||a|| over all samples, `max_difference` the largest |a - b| over the largest |a|.
    """
    reference = torch.cat([a.detach().double().cpu() for a, _ in pairs])
    output = torch.cat([b.detach().double().cpu() for _, b in pairs])
    gap = reference - output
    checks = {
        "divergence": float(divergence(reference, output).mean()),
        "relative_difference": float(gap.norm() / reference.norm().clamp_min(1e-30)),
        "max_difference": float(gap.abs().max() / reference.abs().max().clamp_min(1e-30)),
        "samples": float(reference.shape[0]),
    }
    if divergence.resolve(reference) == "kl":
        checks["same_class"] = float((reference.argmax(-1) == output.argmax(-1)).double().mean())
    return checks
