"""Which width, share of the rank and bits an adaptive model runs at.

They are chosen for a budget on latency, energy or any measure.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import nn

from tdpass.cost import Budget, BudgetSpec, Cost
from tdpass.errors import BudgetError
from tdpass.files import cache_folder
from tdpass.layers.adaptive import dial_of
from tdpass.methods.stages import Score
from tdpass.models import ExampleInputs, as_example
from tdpass.models.base import call_batch
from tdpass.models.torch.model import TorchModel
from tdpass.models.torch.ordinary import open_setting
from tdpass.targets import Setting, Target, open_target


@dataclass(frozen=True)
class Priced:
    """One setting of a model, what a call costs there, and how well it answers where that was scored."""

    width: float
    rank: float
    bits: int
    cost: Cost
    score: float | None = None


class Controller:
    """Knows what every setting of an adaptive model costs on a target.

    It turns the model to the best that a budget has room for. Each setting is priced once, as the ordinary
    model that it stands for: with multiply-adds, parameters and bytes, and what the target tells of a call of
    `batch` samples on `threads` threads; a machine that is here is measured.  The best setting is that of the
    highest `score`, without one that of most multiply-adds, and of those that of most bits.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        target: str | Target = "cpu",
        *,
        batch: int = 1,
        threads: int = 1,
        score: Score | None = None,
    ) -> None:
        self.model, adaptation = model, dial_of(model).adaptation
        places = list(itertools.product(adaptation.widths, adaptation.ranks, adaptation.bits or (0,)))
        example = as_example(example_inputs)
        opened = [open_setting(model, width, rank, example, bits or None) for width, rank, bits in places]
        self.target = open_target(target, "torch", cache_folder())
        told = self.target.cost_models(
            opened, lambda: call_batch(opened[-1], [], batch), Setting(batch, threads)
        )
        scores = [None if score is None else float(score(each.module.eval())) for each in opened]
        self.settings = [
            Priced(*place, cost=_with_counts(each, cost), score=mark)
            for place, each, cost, mark in zip(places, opened, told, scores, strict=True)
        ]

    def choose(self, budget: BudgetSpec) -> Priced:
        """Turn the model to the best setting within a budget such as `{"seconds": "2ms"}`.

        A budget on the whole model is `{"joules": 0.4}`, say. Raises `BudgetError` where none is within it;
        the model then stays as it is.
        """
        wanted = Budget.parse(budget, default="macs")
        limits = wanted.limits(self.settings[-1].cost)
        within = [
            setting
            for setting in self.settings
            if all(setting.cost.get(measure) <= limit for measure, limit in limits.items())
        ]
        if not within:
            least = min(self.settings, key=lambda setting: setting.cost.get(next(iter(limits))))
            smallest = ", ".join(f"{measure}={least.cost.get(measure):.4g}" for measure in limits)
            raise BudgetError(
                f"no width is within {wanted}; the smallest, {least.width} at rank {least.rank}, takes "
                f"{smallest}"
            )
        best = max(within, key=lambda setting: (setting.score or 0.0, setting.cost.macs, setting.bits))
        dial, adaptation = dial_of(self.model), dial_of(self.model).adaptation
        dial.width, dial.rank = adaptation.widths.index(best.width), adaptation.ranks.index(best.rank)
        dial.bits = best.bits
        return best


def _with_counts(model: TorchModel, told: Cost) -> Cost:
    return told.replace(macs=model.count().per_sample, params=model.params(), bytes=model.bytes())
