"""What distributions over classes share.

The axis of the classes, and how sharply KL is curved in their logits.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from torch import Tensor

from tdpass.planner.comparisons.base import Comparison

LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Distribution(Comparison, ABC):
    """A distribution over the classes along `axis`.

    `curvature` is that of KL per direction in which the logits may move.
    """

    axis: int = -1
    curvature: float = 1.0

    @property
    def classes(self) -> int:
        return self.axis

    @property
    def gain(self) -> float:
        return self.curvature


def curvature(p: Tensor, axis: int) -> float:
    """Half the trace of KL's Hessian in the logits, sum p (1 - p), per direction in which they move."""
    uncertain = 1 - p.square().sum(axis)
    return max(float(uncertain.mean()) / (2 * max(p.shape[axis] - 1, 1)), LEAST_PROBABILITY)


def kl_terms(p: Tensor, q: Tensor) -> Tensor:
    """Terms p log(p / q) - p + q of KL(p || q), which no rounding makes negative."""
    p, q = p.clamp_min(LEAST_PROBABILITY), q.clamp_min(LEAST_PROBABILITY)
    return p * (p / q).log() - p + q
