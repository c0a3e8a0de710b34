"""composed: several sets at once, each projection after the one before."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.errors import UsageError


@register_constraint
@dataclass(frozen=True)
class Composed(Constraint):
    """The intersection of sets whose later projections leave the earlier sets intact.

    Supports, then signs, then levels. Projecting on one after the other ends in all of them.  For the support
    that the first ones choose it is the nearest weight; another support may have a nearer one, by what the
    later sets cost.
    """

    parts: tuple[Constraint, ...]
    name = "composed"

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("no constraints are composed; give at least one, or use Unconstrained()")

    def project(self, weight: Tensor) -> Tensor:
        checked(weight)
        for part in self.parts:
            weight = part.project(weight)
        return weight

    def frozen(self, weight: Tensor) -> Composed:
        return Composed(tuple(part.frozen(weight) for part in self.parts))

    def __str__(self) -> str:
        return " and ".join(part.name for part in self.parts)
