"""What a method pays for forms and ranks: one measure, counted or told by a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from tdpass.constraints.rank_budget import Price
from tdpass.cost import Budget, Cost, amount
from tdpass.errors import BudgetError
from tdpass.files import cache_folder
from tdpass.form import DENSE, Form, Rank
from tdpass.formats.layer import cost_of
from tdpass.measures import MEASURES
from tdpass.methods.ledger import Ledger
from tdpass.models.base import Batch, Model
from tdpass.planner.prices import deciding
from tdpass.site import Site
from tdpass.targets import ONE_CALL, Setting, Target, TimedTarget, open_target


class OnTarget(Protocol):
    """The options of a method whose prices are those of a machine.

    Calls of `batch` samples on `threads` threads.
    """

    target: str | Target | None
    batch: int
    threads: int
    cache: Path | None
    ledger: Ledger | None


@dataclass(frozen=True)
class Tariff:
    """Amounts of one measure; without a target it is one that is counted.

    What a target tells is asked once and stands in the `ledger`.
    """

    measure: str
    target: Target | None = None
    setting: Setting = ONE_CALL
    ledger: Ledger = field(default_factory=Ledger)

    @classmethod
    def on_target(cls, on: OnTarget, budget: Budget | None) -> Tariff | None:
        """That of the measure which the budget bounds, else of what the target tells first.

        None without a target. Raises `BudgetError` for a budget on what the target does not tell.
        """
        if on.target is None:
            return None
        target = open_target(on.target, "torch", on.cache or cache_folder())
        if budget is not None and not set(budget.measures) & set(target.measures):
            tells = ", ".join(target.measures)
            raise BudgetError(
                f"budget {budget} bounds nothing that target {target.name} tells; bound one of {tells}, or "
                "leave target out"
            )
        setting = Setting(on.batch, on.threads)
        return cls(deciding(target, budget)[0], target, setting, on.ledger or Ledger())

    def amounts(self, site: Site, forms: Sequence[Form]) -> list[float]:
        """What the site costs in each form."""
        if self.target is None:
            return [cost_of(site, form).get(self.measure) for form in forms]
        return self.ledger.amounts(site, forms, partial(self._asked, self.target, site))

    def sure(self, site: Site, form: Form) -> float:
        """What the site costs in a form that is about to be chosen, measured anew where amounts are measured.

        A choice among many prices that were measured in a hurry falls on those that came out too low.
        """
        if not isinstance(self.target, TimedTarget) or form == DENSE:
            return self.amounts(site, [form])[0]
        (found,) = self.ledger.amounts(site, [form], partial(self._timed, self.target, site), " with care")
        self.ledger.keep()
        return found

    def _timed(self, target: TimedTarget, site: Site, forms: Sequence[Form]) -> list[float]:
        return [timing.seconds for timing in target.time(site, forms, self.setting, careful=True)]

    def _asked(self, target: Target, site: Site, forms: Sequence[Form]) -> list[float]:
        return [cost.get(self.measure) for cost in target.cost(site, forms, self.setting)]

    def whole(
        self, target: Target, models: Sequence[Model], call: Callable[[], Batch], yardstick: Site
    ) -> list[Cost]:
        """What one call of each model costs there, on the scale of the yardstick's dense price.

        Where that was told before an interruption, the machine may say something else of it now.
        """
        costs = target.cost_models(models, call, self.setting, yardstick)
        if not target.here:
            return costs
        before, now = self.amounts(yardstick, [DENSE]), self._asked(target, yardstick, [DENSE])
        scale = before[0] / now[0]
        return [
            Cost.of({measure: cost.get(measure) * scale for measure in target.measures}) for cost in costs
        ]

    def text(self, value: float) -> str:
        """An amount as people read it."""
        return (
            f"{amount(self.measure, value)} {self.measure}"
            if MEASURES.get(self.measure).whole
            else amount(self.measure, value)
        )

    def price(self, format_of: Callable[[Site], str]) -> Price:
        """What a site costs at a rank of its format, or dense."""

        def price(site: Site, rank: Rank | None) -> float:
            (amount,) = self.amounts(site, [DENSE if rank is None else Form(format_of(site), rank)])
            return amount

        return price


def price_on_target(on: OnTarget, budget: Budget | None, format_of: Callable[[Site], str]) -> Price | None:
    """What a site costs there at a rank, in the measure that decides; None without a target."""
    tariff = Tariff.on_target(on, budget)
    return None if tariff is None else tariff.price(format_of)
