"""Which candidates are worth considering: those that no other beats, those that a budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tdpass.cost import Budget
from tdpass.planner.candidates import Candidate


def frontier(candidates: Sequence[Candidate], measures: Sequence[str], slack: float = 1.0) -> list[Candidate]:
    """Those that no other beats in every measure by more than `slack` in error, cheapest first."""
    ordered = sorted(candidates, key=lambda c: (c.error, c.cost.get(measures[0])))
    kept: list[Candidate] = []
    for candidate in ordered:
        beaten = any(
            other.error * slack <= candidate.error
            and all(other.cost.get(m) <= candidate.cost.get(m) for m in measures)
            for other in kept
        )
        if not beaten:
            kept.append(candidate)
    return sorted(kept, key=lambda c: c.cost.get(measures[0]))


def within(candidates: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """Those whose error the budget allows."""
    limit = budget.max_error
    return [c for c in candidates if limit is None or c.error <= limit]


def with_loss(candidate: Candidate, loss: float, estimated: bool = False) -> Candidate:
    """The candidate with its expected loss."""
    return replace(candidate, loss=loss, estimated=estimated)
