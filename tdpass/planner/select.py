"""Choosing one candidate per site: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tdpass.cost import Cost, amount
from tdpass.errors import BudgetError
from tdpass.measures import MEASURES
from tdpass.planner.candidates import Candidate

_SECONDS = 30.0


@dataclass(frozen=True)
class Option:
    """Candidates that must be taken together.

    One for a single site, several where neighbours change jointly.
    """

    parts: Mapping[str, Candidate]
    loss: float

    @property
    def cost(self) -> Cost:
        """Cost of all parts."""
        return sum((candidate.cost for candidate in self.parts.values()), Cost())


def select(
    options: Sequence[Option], sites: Sequence[str], limits: Mapping[str, float], fixed: Cost
) -> dict[str, Candidate]:
    """The cheapest loss within the limits.

    Min sum loss x, every site covered exactly once, sum cost x <= limit - fixed. Solved by HiGHS branch and
    bound.  `fixed` is the cost of everything that is not a site. Raises `BudgetError` naming the smallest
    reachable value when no choice fits.
    """
    chosen = _solve(options, sites, limits, fixed, [option.loss for option in options])
    if chosen is None:
        raise BudgetError(_smallest(options, sites, limits, fixed))
    return chosen


def cheapest(options: Sequence[Option], sites: Sequence[str], measure: str) -> dict[str, Candidate]:
    """The smallest model in one measure, whatever the loss."""
    chosen = _solve(options, sites, {}, Cost(), [float(option.cost.get(measure)) for option in options])
    assert chosen is not None
    return chosen


def _solve(
    options: Sequence[Option],
    sites: Sequence[str],
    limits: Mapping[str, float],
    fixed: Cost,
    objective: Sequence[float],
) -> dict[str, Candidate] | None:
    if not sites:
        return {} if all(fixed.get(measure) <= limit for measure, limit in limits.items()) else None
    # takes half a second, and only planning needs it
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415
    from scipy.sparse import csr_array  # noqa: PLC0415 - as above

    rows = {site: row for row, site in enumerate(sites)}
    entries = [(rows[site], column) for column, option in enumerate(options) for site in option.parts]
    cover = csr_array(
        (np.ones(len(entries)), tuple(zip(*entries, strict=True))), shape=(len(sites), len(options))
    )
    constraints = [LinearConstraint(cover, 1, 1)]
    for measure, limit in limits.items():
        room = limit - fixed.get(measure)
        if room < 0:
            return None
        costs = np.array([option.cost.get(measure) for option in options], dtype=float)
        # the solver's tolerance is absolute: whatever the measure's unit, the largest number is about 1
        unit = room or float(costs.max()) or 1.0
        constraints.append(LinearConstraint(costs[None, :] / unit, -np.inf, room / unit))
    goal = np.asarray(objective, dtype=float)
    scale = np.abs(goal).max()
    with _silenced():
        result = milp(
            goal / scale * 1e3 if scale > 0 else goal,
            constraints=constraints,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"time_limit": _SECONDS, "mip_rel_gap": 1e-5},
        )
    if result.x is None:
        return None
    return {
        site: candidate
        for option, x in zip(options, result.x, strict=True)
        if x > 0.5
        for site, candidate in option.parts.items()
    }


@contextmanager
def _silenced() -> Iterator[None]:
    """Drop what native code prints.

    HiGHS leaves debug lines on standard output, which belongs to the caller.
    """
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(sink)


def _smallest(
    options: Sequence[Option], sites: Sequence[str], limits: Mapping[str, float], fixed: Cost
) -> str:
    parts: list[str] = []
    for measure, limit in limits.items():
        chosen = cheapest(options, sites, measure) if sites else {}
        least = fixed.get(measure) + sum(candidate.cost.get(measure) for candidate in chosen.values())
        if least > limit:
            stays = amount(measure, fixed.get(measure))
            # rounded up, so that a budget of just what is named here can be met
            asked, reachable = (
                amount(measure, limit),
                amount(measure, least if MEASURES.get(measure).whole else least * 1.0005),
            )
            parts.append(
                f"budget of {asked} {measure} is below the smallest reachable plan ({reachable}, of which "
                f"{stays} in layers that stay)"
            )
    if not parts:
        return "no plan meets all budgets at once; raise one of them: " + ", ".join(
            f"{m} <= {amount(m, v)}" for m, v in limits.items()
        )
    return "; ".join(parts) + "; raise it, allow more sites, or loosen max_error"
