"""support: weights that are zero outside a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.errors import PlanError


@register_constraint
@dataclass(frozen=True, eq=False)
class Support(Constraint):
    """W * mask: what a frozen `Sparse` or `NOfM` is.

    Raises `PlanError` for a weight of another shape.
    """

    mask: Tensor
    name = "support"

    def project(self, weight: Tensor) -> Tensor:
        if weight.shape != self.mask.shape:
            raise PlanError(
                f"a mask of shape {tuple(self.mask.shape)} does not fit a weight of shape "
                f"{tuple(weight.shape)}; make it from this weight"
            )
        checked(weight)
        return masked(weight, self.mask.to(weight.device, torch.bool))

    def __str__(self) -> str:
        return f"{int(self.mask.count_nonzero()):,} given weights"


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Finite weights where the boolean mask says so, zero elsewhere."""
    return (weight.detach() * mask).add_(
        0.0
    )  # where() takes up to thrice as long, by density; the product alone leaves negative zeros
