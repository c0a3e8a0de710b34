"""unconstrained: no constraint, for weights that stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint


@register_constraint
@dataclass(frozen=True)
class Unconstrained(Constraint):
    """All weights."""

    name = "unconstrained"

    def project(self, weight: Tensor) -> Tensor:
        checked(weight)
        return weight.detach().clone()

    def __str__(self) -> str:
        return "unconstrained"
