"""Levels of many weights chosen together, against a quadratic model of what they lose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.errors import UsageError

_SWEEPS = 50
_GAIN = 1e-12


@dataclass(frozen=True)
class Lattice:
    """The points whose entry k is one of `+-q_k, +-2 q_k ... +-n_k q_k`; `intervals` q and `counts` n are vectors."""

    intervals: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        if self.intervals.shape != self.counts.shape or self.intervals.dim() != 1 or not bool((self.intervals > 0).all()) or not bool((self.counts >= 1).all()):
            raise UsageError(
                f"intervals of shape {tuple(self.intervals.shape)} and counts of shape {tuple(self.counts.shape)} make no lattice; "
                "give positive intervals and as many counts of 1 or more"
            )

    def nearest(self, point: Tensor) -> Tensor:
        """The point nearest to a vector."""
        steps = (point.abs() / self.intervals).round().clamp(min=1).minimum(self.counts)
        return torch.where(point < 0, -1.0, 1.0) * steps * self.intervals

    def descend(self, matrix: Tensor, slope: Tensor, centre: Tensor) -> Tensor:
        """A point z that no change of one entry improves in  slope . d + d^T matrix d / 2  with d = z - centre, from the nearest on.

        Coordinate descent on the closest-vector problem (Babai's rounding, then sweeps in order): `matrix [n, n]` must have a positive
        diagonal.  O(n) per change, so its correlations are heeded where rounding each weight alone ignores them.
        """
        point = self.nearest(centre)
        residual = matrix @ (point - centre) + slope
        curves, intervals, counts = matrix.diagonal().tolist(), self.intervals.tolist(), self.counts.tolist()
        for _ in range(_SWEEPS):
            changed = False
            for k, (curve, q, n) in enumerate(zip(curves, intervals, counts, strict=True)):
                here, pull = float(point[k]), float(residual[k])
                wanted = here - pull / curve
                new = (-q if wanted < 0 else q) * min(max(round(abs(wanted) / q), 1), n)
                step = new - here
                if step and pull * step + curve * step * step / 2 < -_GAIN:
                    point[k] = new
                    residual += matrix[k] * step
                    changed = True
            if not changed:
                break
        return point
