"""How far outputs are from the original's, measured without tdpass.

These are the numbers of `report.checks`, computed another way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]

ROUNDING = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Relative difference between two ways to compute a small net of that type."""


def off(reference: Tensor, output: Tensor) -> float:
    """||a - b|| / ||a|| in float64; infinite where shapes differ or the output is not finite."""
    if reference.shape != output.shape or not bool(torch.isfinite(output).all()):
        return float("inf")
    a, b = reference.double(), output.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def differences(reference: Sequence[Outputs], outputs: Sequence[Outputs]) -> dict[str, float]:
    """`relative_difference` and `max_difference`, each the worst over outputs, over all calls."""
    pairs = [_together(name, reference, outputs) for name in reference[0]]
    return {
        "relative_difference": max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs),
        "max_difference": max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs),
    }


def divergences(measure: str, reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[float]:
    """What one output's divergence may be: a value per axis that channels or classes may lie along."""
    dims = reference[0].dim()
    axes = [axis for axis in range(1, dims) if len({value.shape[axis] for value in reference}) == 1]
    count = DIVERGENCES[measure]
    return [
        count(
            [v.double().movedim(axis, -1) for v in reference], [v.double().movedim(axis, -1) for v in outputs]
        )
        for axis in axes
    ]


def _kl(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    rows = [
        (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).flatten()
        for a, b in zip(reference, outputs, strict=True)
    ]
    return float(torch.cat(rows).mean())


def _kl_probabilities(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    pairs = [(a.clamp_min(1e-12), b.clamp_min(1e-12)) for a, b in zip(reference, outputs, strict=True)]
    return float(torch.cat([(a * a.log() - a * b.log() + b - a).sum(-1).flatten() for a, b in pairs]).mean())


def _kl_bernoulli(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    one = [torch.stack([a, 1 - a], -1) for a in reference]
    two = [torch.stack([b, 1 - b], -1) for b in outputs]
    return _kl_probabilities(one, two)


def _cosine(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    rows = [
        1 - torch.cosine_similarity(a.flatten(1), b.flatten(1))
        for a, b in zip(reference, outputs, strict=True)
    ]
    return float(torch.cat(rows).mean())


def _mse(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Squared error over the variance of each channel.

    The variance is raised by a ten-thousandth of the geometric mean of those that vary.
    """
    a, b = (
        torch.cat([value.reshape(-1, value.shape[-1]) for value in values]) for values in (reference, outputs)
    )
    spread = a.var(0, unbiased=False) if len(a) >= 8 else a.square().mean(0)
    varying = spread[spread > 1e-8 * spread.max()]
    typical = float(varying.log().mean().exp()) if len(varying) else float(a.square().mean()) or 1.0
    return float(((a - b).square().mean(0) / (spread + 1e-4 * typical)).mean())


DIVERGENCES: Mapping[str, Callable[[Sequence[Tensor], Sequence[Tensor]], float]] = {
    "kl": _kl,
    "kl_probabilities": _kl_probabilities,
    "kl_bernoulli": _kl_bernoulli,
    "cosine": _cosine,
    "mse": _mse,
}


def _together(
    name: str, reference: Sequence[Outputs], outputs: Sequence[Outputs]
) -> tuple[np.ndarray, np.ndarray]:
    a, b = (
        np.concatenate([call[name].double().numpy().ravel() for call in calls])
        for calls in (reference, outputs)
    )
    return a, b
