"""Projections that are searches: each begins where the last one ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tdpass.constraints.base import Constraint
from tdpass.constraints.in_format import InFormat
from tdpass.formats import Factors
from tdpass.training.terms import State, Term


@dataclass(frozen=True)
class SolvedInFormat(InFormat):
    """The set of `InFormat` for the one weight that `start` was searched for.

    These factors are its projection.
    """

    def factors(self, weight: Tensor) -> Factors:
        assert self.start is not None
        return self.start


class WarmStarts(Term):
    """The constraints of weights by name, as a rule.

    Those on formats with local optima go on from the factors they found last. A search that began anew in
    every round would end in other optima, so that Z jumps however little W moves.  The factors are part of a
    checkpoint.
    """

    def __init__(self, constraints: Mapping[str, InFormat]) -> None:
        self.constraints = dict(constraints)

    def rule(self, progress: float, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        """The constraints, with what the searches find for these whole weights."""
        found: dict[str, Constraint] = dict(self.constraints)
        for name, bound in self._searched().items():
            start = bound.factors(weights[name])
            self.constraints[name] = replace(bound, start=start)
            found[name] = SolvedInFormat(bound.site, bound.format, bound.rank, start)
        return found

    def _searched(self) -> dict[str, InFormat]:
        return {name: bound for name, bound in self.constraints.items() if bound.searched}

    def state(self) -> State:
        return {
            f"{name}.{key}": factor.clone()
            for name, bound in self._searched().items()
            for key, factor in (bound.start or {}).items()
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, bound in self._searched().items():
            self.constraints[name] = replace(
                bound, start={key: state[f"{name}.{key}"] for key in bound.start or {}}
            )
