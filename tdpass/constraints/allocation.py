"""Sharing a budget: one option for each name, of least summed loss within a summed cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdpass.errors import BudgetError

Numbers = NDArray[np.float64]
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Options:
    """What each option of one name costs and loses."""

    costs: Numbers
    losses: Numbers

    def hull(self) -> list[int]:
        """Options on the lower convex hull of (cost, loss), from cheapest to least loss.

        What some price of cost would choose.
        """
        found: list[int] = []
        for k in np.lexsort((self.losses, self.costs)).tolist():
            if found and self.losses[k] >= self.losses[found[-1]]:
                continue
            while len(found) > 1 and not self._bends(found[-2], found[-1], k):
                found.pop()
            found.append(k)
        return found

    def _bends(self, a: int, b: int, c: int) -> bool:
        """Whether b lies below the line from a to c."""
        x, y = self.costs, self.losses
        return bool((y[a] - y[b]) * (x[c] - x[b]) > (y[b] - y[c]) * (x[b] - x[a]))


def allocate(options: Mapping[str, Options], limit: float, text: Callable[[float], str]) -> dict[str, int]:
    """The chosen option of each name, by index.

    Starts from least loss and walks all hulls towards cheap, always where a unit of cost saved loses least.
    A step that meets the limit ends one candidate, and is then left out, so that a large step does not have
    the last word; the best candidate is taken. Room that is left goes to the options that gain most from it.
    Raises `BudgetError` naming the least reachable; `text` writes a cost.
    """
    hulls = {name: option.hull() for name, option in options.items()}
    least = sum(float(options[name].costs[hull[0]]) for name, hull in hulls.items())
    allowed = limit * (1 + _ROUNDING)
    if least > allowed:
        raise BudgetError(
            f"budget of {text(limit)} is below the smallest reachable ({text(least)}); raise it, or let "
            "more layers be compressed"
        )
    chosen = {name: hull[-1] for name, hull in hulls.items()}
    if _total(options, chosen) <= allowed:
        return chosen
    moves = sorted(
        (slope, order, -place, name)
        for order, (name, hull) in enumerate(hulls.items())
        for place, slope in _steps(options[name], hull)
    )
    candidates: list[dict[str, int]] = []
    done: set[str] = set()
    for _, _, place, name in moves:
        if name in done:
            continue
        trial = {**chosen, name: hulls[name][-place - 1]}
        if _total(options, trial) <= allowed:
            candidates.append(_filled(options, trial, allowed))
            done.add(name)
        else:
            chosen = trial
    return min(
        candidates, key=lambda choice: sum(float(options[name].losses[k]) for name, k in choice.items())
    )


def _steps(option: Options, hull: list[int]) -> list[tuple[int, float]]:
    """Places on a hull but the first, with the loss per unit of cost saved on the way to the one before."""
    costs, losses = option.costs[hull], option.losses[hull]
    slopes = (losses[:-1] - losses[1:]) / np.maximum(np.diff(costs), 1e-300)
    # Rounding must not let a name jump over one of its own steps.
    return list(zip(range(1, len(hull)), np.minimum.accumulate(slopes).tolist(), strict=True))


def _total(options: Mapping[str, Options], chosen: Mapping[str, int]) -> float:
    return sum(float(options[name].costs[k]) for name, k in chosen.items())


def _filled(options: Mapping[str, Options], chosen: Mapping[str, int], allowed: float) -> dict[str, int]:
    """The choice with what room is left spent, once for each name, those first that gain most."""
    found, room = dict(chosen), allowed - _total(options, chosen)
    best = {name: _best_within(options[name], k, room) for name, k in chosen.items()}
    gains = {
        name: float(options[name].losses[k] - options[name].losses[best[name]]) for name, k in chosen.items()
    }
    for name in sorted(chosen, key=lambda name: -gains[name]):
        if gains[name] > 0:
            found[name] = _best_within(options[name], found[name], allowed - _total(options, found))
    return found


def _best_within(option: Options, k: int, room: float) -> int:
    """The option of least loss, then of least cost, that costs at most `room` more than option k."""
    losses = np.where(option.costs <= option.costs[k] + room, option.losses, np.inf)
    least = losses.min()
    return int(np.where(losses == least, option.costs, np.inf).argmin()) if least < option.losses[k] else k
