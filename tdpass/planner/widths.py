"""A model at several widths, made on copies of it, and the widest that is within a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdpass.cost import Budget, Cost, amount
from tdpass.errors import BudgetError, UsageError
from tdpass.measures import counted
from tdpass.models.base import Batch, Model


@dataclass(frozen=True)
class Widths:
    """`narrow` leaves a share of the `width` channels of a model, `least` of them or more.

    `name` is that of the pass, `what` it slices.
    """

    model: Model
    example: Batch
    narrow: Callable[[Model, float], None]
    width: int
    least: int
    name: str
    what: str

    def at(self, keep: float) -> Model:
        """A copy that keeps that share of its channels."""
        twin = self.model.clone()
        self.narrow(twin, keep)
        return twin

    def largest(self, budget: Budget, original: Cost) -> float:
        """The largest share that is within a budget; raises `BudgetError` where none is."""
        limits = budget.limits(original)
        if wrong := [measure for measure in limits if measure not in counted()]:
            raise BudgetError(
                f"{self.name} takes no budget on {wrong[0]}; bound one of {', '.join(counted())}"
            )
        least = self._cost(self.least)
        for measure, limit in limits.items():
            if least.get(measure) > limit:
                raise BudgetError(
                    f"the budget of {amount(measure, limit)} {measure} cannot be met by slicing {self.what}; "
                    f"the smallest that can is {amount(measure, least.get(measure))}"
                )
        low, high = self.least, self.width + 1
        while high - low > 1:
            middle = (low + high) // 2
            cost = self._cost(middle)
            within = all(cost.get(measure) <= limit for measure, limit in limits.items())
            low, high = (middle, high) if within else (low, middle)
        return low / self.width

    def _cost(self, count: int) -> Cost:
        twin = self.at(count / self.width)
        return Cost(twin.params(), twin.count(self.example).per_sample, twin.bytes())


def checked_share(keep: float, instead: str) -> None:
    """Raise `UsageError` for a share that is none; `instead` is an example of a budget."""
    if not 0 < keep <= 1:
        raise UsageError(
            f"keep={keep!r} is no share of the channels; give one in (0, 1], or a budget such as {instead}"
        )
