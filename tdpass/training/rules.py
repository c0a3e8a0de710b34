"""Which constraint each weight has in a round, and their projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tdpass.constraints.base import Constraint, Shared
from tdpass.training.placement import from_first, from_owner, world

Rule = Callable[[float, Mapping[str, Tensor]], Mapping[str, Constraint]]


def fixed(constraints: Mapping[str, Constraint]) -> Rule:
    """The rule that always answers with the same constraints."""
    return lambda progress, weights: constraints


def shared(budget: Shared) -> Rule:
    """The rule that divides one budget anew at every projection."""
    return lambda progress, weights: budget.divide(weights)


def projections(rule: Rule, progress: float, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projections of those whole weights that the rule names.

    Each process finds its share of them, and all get all.
    """
    rank, size = world()
    constraints = from_first(rule(progress, weights))
    found: dict[str, Tensor] = {}
    for index, (name, weight) in enumerate(
        (name, weight) for name, weight in weights.items() if name in constraints
    ):
        found[name] = constraints[name].project(weight) if index % size == rank else torch.empty_like(weight)
    return {
        name: from_owner(value.contiguous(), index % size)
        for index, (name, value) in enumerate(found.items())
    }
