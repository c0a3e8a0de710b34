"""integer_levels: weights as integers times one scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.errors import PlanError, UsageError

_SHORT = 512
_CLIPPED = 2.2
_STEPS = 4


@register_constraint
@dataclass(frozen=True, eq=False)
class IntegerLevels(Constraint):
    """`W[o] = scale[o] k` with integers k from -n to n, `n = 2^(bits - 1) - 1`; zero is a level.

    Without `scales` the projection finds those of least squared error: a scan, then alternation between the
    nearest integers and `scale = sum k w / sum k^2`.
    """

    bits: int = 8
    scales: Tensor | None = None
    name = "integer_levels"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits={self.bits} of integer weights is outside 2 to 8")

    @property
    def top(self) -> int:
        """The largest integer."""
        return int(2 ** (self.bits - 1)) - 1

    def project(self, weight: Tensor) -> Tensor:
        matrix = checked(weight).flatten(1)
        scales = self._scales(matrix)[:, None]
        return (self._integers(matrix, scales) * scales).reshape(weight.shape).to(weight.dtype)

    def frozen(self, weight: Tensor) -> IntegerLevels:
        return (
            self
            if self.scales is not None
            else replace(self, scales=self._scales(checked(weight).flatten(1)))
        )

    def _integers(self, matrix: Tensor, scales: Tensor) -> Tensor:
        return (matrix / scales).round_().clamp_(-self.top, self.top)

    def _scales(self, matrix: Tensor) -> Tensor:
        """One scale for each row, as given or found; one where a row is zero."""
        if self.scales is not None:
            if len(self.scales) != len(matrix):
                raise PlanError(
                    f"{len(self.scales)} scales do not fit a weight of {len(matrix)} output channels; make "
                    "them from this weight"
                )
            return self.scales.to(matrix)
        peak = matrix.abs().amax(1, keepdim=True)
        peak = torch.where(peak > 0, peak, torch.full_like(peak, float(self.top)))
        # Clipping pays beyond the top integer; the largest of a short row may also come to rest below it.
        short = matrix.shape[1] <= _SHORT
        lower = torch.arange(max(1, self.top - 7), self.top) if short else torch.empty(0)
        places = torch.cat([lower, self.top * torch.linspace(1, _CLIPPED, 16 if short else 6)]).to(matrix)
        errors = torch.stack(
            [
                (matrix - self._integers(matrix, peak / place) * (peak / place)).square().sum(1)
                for place in places
            ]
        )
        scales = peak / places[errors.argmin(0)][:, None]
        for _ in range(_STEPS):
            k = self._integers(matrix, scales)
            squares = k.square().sum(1, keepdim=True)
            scales = torch.where(
                squares > 0, (k * matrix).sum(1, keepdim=True) / squares.clamp_min(1), scales
            )
        return scales.squeeze(1)

    def __str__(self) -> str:
        return f"{self.bits}-bit integers"
