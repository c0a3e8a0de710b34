"""HALOC: ranks and formats of all layers as a differentiable choice, under what they cost on a machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tdpass.artifact import Artifact
from tdpass.constraints.allocation import Options, allocate
from tdpass.constraints.base import Constraint
from tdpass.constraints.in_format import InFormat
from tdpass.cost import Budget, BudgetValue
from tdpass.data import calls_of
from tdpass.errors import BudgetError, UsageError
from tdpass.following import followed
from tdpass.form import DENSE, Form
from tdpass.formats.metric import Metric
from tdpass.measures import counted
from tdpass.methods.assembled import Assembled
from tdpass.methods.base import register_method
from tdpass.methods.beginning import Beginning, measured, unit_of
from tdpass.methods.calibrated import answers_of, metrics_of
from tdpass.methods.factored import Factored
from tdpass.methods.menu import Menu
from tdpass.methods.tariff import Tariff
from tdpass.models import open_model
from tdpass.models.abilities import RecalibratesBatchNorm
from tdpass.targets import Target
from tdpass.training.choices import Choices
from tdpass.training.parametrized import Parametrized, dense_values, parametrized, with_parametrizations
from tdpass.training.phases import Phase
from tdpass.training.placement import Template, bare
from tdpass.training.rank_search import Answers, Approach, Prices, RankSearch
from tdpass.training.schedules import Geometric, ScheduleSpec, as_schedule
from tdpass.training.terms import Term

Begin = Literal["losses", "weights", "uniform"]
Sliced = Literal["svd", "channel_svd", "input_svd", "spatial_svd", "tucker2"]
_COOLING = Geometric(2.0, 0.2)
_TURNS = 4  # of choosing and of making sure of the prices of what was chosen


@register_method
@dataclass
class Haloc(Factored):
    """min_{W, alpha} f(sum_c p_lc W_lc) + penalty * E[cost] over the forms of each layer l.

    Here p_l = softmax((alpha_l + g) / tau). Xiao, Zhang, Gong, Yin, Sui, Xiang, Tao, Yuan: HALOC:
    Hardware-Aware Automatic Low-Rank Compression, AAAI 2023.  The forms of a layer are dense and up to
    `ranks` ranks of each of `formats`, both Tucker ranks free; all ranks of a format are the leading parts of
    one ordered set of factors (`Choices`), so that a step costs what the dense network does.

    Every form begins as likely as little is lost with that layer alone in it, KL(dense || network) on the
    calibration data, at the penalty or, under a budget, the price that meets it (`Beginning`); with
    `begin="weights"`, and without calibration data, as its weight is near the original one in the metric, with
    `begin="uniform"` as likely as any other.  Steps of alpha are of size `rate`: what noise adds to its logits
    in a few hundred steps is to stay below the one that lies between neighbours.  Against a start that knows
    nothing, a search needs a rate of 0.1.  In turn: *warm*, where alpha stays, so that no form
    is given up before it was trained;  *search*, where steps of the weights alternate with steps of alpha
    on the calibration data, which the weights do not see: KL(dense || network) + penalty * E[cost]
    (`RankSearch`);  then the most probable forms, or those that a `budget` allows of most worth, are
    chosen, and *tune* trains them alone.  In the first two every candidate is drawn to the original layer's
    output by `approach` (`Approach`).  Without calibration data alpha learns from the training batches.
    Phases without rounds are left out.

    The cost is `measure`, or what a `target` tells of the sites, for calls of `batch` samples on `threads`
    threads, both as shares of the dense ones; under a budget it is how far the cost is from that.  The report
    says what it was predicted to be and what the assembled network takes.
    """

    name = "haloc"
    format = "svd"

    budget: Mapping[str, BudgetValue] | None = None
    penalty: float = 1.0
    measure: str = "macs"
    target: str | Target | None = None
    batch: int = 1
    threads: int = 1
    formats: Sequence[Sliced] = ("svd", "channel_svd", "spatial_svd", "tucker2")
    ranks: int = 6
    warm: int = 2
    search: int = 10
    tune: int = 8
    every: int = 1
    rate: float = 0.02
    begin: Begin = "losses"
    temperature: ScheduleSpec = _COOLING
    approach: float = 0.1
    samples: int = 512
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    cache: Path | None = None
    forms: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        known = get_args(Sliced)
        if not self.formats or not set(self.formats) <= set(known):
            raise UsageError(f"formats={tuple(self.formats)}: {self.name} chooses among {', '.join(known)}")
        if self.measure not in counted():
            raise UsageError(
                f"measure={self.measure!r} is not counted; give one of {', '.join(counted())}, or a target"
            )
        if self.ranks < 1 or self.every < 1 or self.samples < 1:
            raise UsageError(
                f"ranks={self.ranks}, every={self.every}, samples={self.samples} are counts; give 1 or more"
            )
        for name in ("penalty", "rate", "approach"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)} is no number of at least 0")
        if self.begin not in get_args(Begin):
            raise UsageError(f"begin={self.begin!r} is none of {', '.join(get_args(Begin))}")
        as_schedule(self.temperature, "temperature")

    @torch.no_grad()
    def choose(self, model: nn.Module) -> None:
        self.opened = open_model(model, self.example)
        example = self.opened.example()
        if example is not None:
            self.opened.observe(example)
        calls = [] if self.calibration is None else calls_of(self.opened, self.calibration, self.samples)[0]
        device = next(model.parameters()).device
        self.batches = [batch.map(lambda tensor: tensor.to(device)) for batch in calls]
        self.limit, self.tariff = self._limited(None if self.budget is None else Budget.parse(self.budget))
        self.menus = {
            name: Menu.of(site, self.formats, self.ranks, self.tariff)
            for name, site in followed("pricing forms", self.sites.items(), self.progress)
        }
        self.whole = sum(menu.costs[0] for menu in self.menus.values())
        self._allocated(
            {name: np.zeros(len(menu.forms)) for name, menu in self.menus.items()}
        )  # or it is refused before training
        self.answers = Answers(self.batches, answers_of(model, self.batches)) if self.batches else None
        self.metrics = (
            metrics_of(self.opened, list(self.sites.values()), self.batches, self.progress)
            if self.batches
            else dict.fromkeys(self.sites, Metric())
        )

    def _limited(self, budget: Budget | None) -> tuple[float, Tariff]:
        """The most that the sites may cost together, and how that is counted."""
        tariff = Tariff.on_target(self, budget) or Tariff(self.measure)
        if budget is not None:
            measure, limit = self.limit_of(budget, tariff.price(self.format_of))
            return limit, tariff if tariff.target else Tariff(measure)
        if tariff.measure == "macs" and not all(site.seen for site in self.sites.values()):
            raise UsageError(
                "multiply-adds as the cost need to see the model running; pass example_inputs=, or "
                "measure='params'"
            )
        return math.inf, tariff

    def restructured(self, model: nn.Module) -> nn.Module:
        self.dense = Template(model)
        made = {
            name: partial(Choices, site, self.menus[name].forms[1:], self.metrics[name])
            for name, site in self.sites.items()
        }
        network = with_parametrizations(model, made)
        layers = parametrized(network, self.sites)
        self.originals = {name: layer.originals[0].detach().clone() for name, layer in layers.items()}
        self.beginning = self._beginning(layers)
        self.trains, self.replaces = (
            sum(parameter.numel() for parameter in net.parameters()) for net in (network, model)
        )
        return network

    def _beginning(self, layers: Mapping[str, Parametrized]) -> Beginning:
        costs = {name: torch.tensor(menu.costs) / self.whole for name, menu in self.menus.items()}
        prices = Prices(costs, self.limit / self.whole if math.isfinite(self.limit) else 0.0)
        distances = {name: Approach(layers, self.originals, 0.0).distances(name) for name in layers}
        if self.begin == "uniform":
            return Beginning.uniform(distances, prices)
        if self.begin == "weights" or not self.batches:
            return Beginning.by(distances, prices, self.penalty)
        losses = measured(self.opened, layers, distances, self.batches, self.progress)
        unit = unit_of(losses, prices, self.penalty)
        return Beginning.by(losses, replace(prices, unit=unit), self.penalty)

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        try:
            self.layers = parametrized(model, self.sites)
        except AttributeError:
            raise UsageError(
                f"the model does not hold choices; attach {self.name} to the module that prepare() returned"
            ) from None
        self.network = bare(model)
        return {
            f"{name}.{k}": part
            for name, layer in self.layers.items()
            for k, part in enumerate(layer.originals)
        }

    def phases(self) -> Sequence[Phase]:
        return [
            Phase("warm", self.warm, partial(self._begin_search, 0)),
            Phase("search", self.search, partial(self._begin_search, self.every)),
            Phase("tune", self.tune, self._begin_tuning),
        ]

    def _begin_search(self, every: int) -> list[Term]:
        self.learning = RankSearch(
            self.network, self._choices(self.layers), self.beginning.logits, self.beginning.prices,
            as_schedule(self.temperature, "temperature"),
            rate=self.rate, penalty=self.penalty, every=every, answers=self.answers,
        )  # fmt: skip
        return [self.learning, Approach(self.layers, self.originals, self.approach)]

    def _begin_tuning(self) -> list[Term]:
        self._settle(self.layers)
        opened = open_model(self.network)
        if self.batches and isinstance(opened, RecalibratesBatchNorm):
            opened.recalibrate_batchnorm(self.batches)
        return []

    def _decide(self) -> None:
        """Choose the forms, once."""
        if self.forms:
            return
        draws = {name: choice.draw for name, choice in self._choices(self.layers).items()}
        logits = {
            name: self.beginning.logits[name] if draw is None else draw.logits.detach()
            for name, draw in draws.items()
        }
        worth = self.beginning.worth(logits)
        lost = {name: (value.max() - value).double().cpu().numpy() for name, value in worth.items()}
        found = self._allocated(lost)
        with suppress(BudgetError):  # of what is surely priced too little may be cheap enough
            for _ in range(_TURNS):
                menus = {name: self._surely(name, k) for name, k in found.items()}
                if menus == self.menus:
                    break
                self.menus = menus
                found = self._allocated(lost)
        self.forms = {name: str(self.menus[name].forms[k]) for name, k in found.items()}

    def _surely(self, name: str, k: int) -> Menu:
        """The menu of a site with the price of that form made sure of."""
        menu = self.menus[name]
        return menu.with_cost(k, self.tariff.sure(self.sites[name], menu.forms[k]))

    def _settle(self, layers: Mapping[str, Parametrized]) -> None:
        """Let the weights be of the forms that are chosen."""
        self._decide()
        for name, choice in self._choices(layers).items():
            choice.chosen = choice.forms.index(Form.parse(self.forms[name]))

    def _allocated(self, losses: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, int]:
        """The form of each site of least summed loss within the limit."""
        options = {name: Options(np.array(self.menus[name].costs), loss) for name, loss in losses.items()}
        return allocate(options, self.limit, self.tariff.text)

    def _choices(self, layers: Mapping[str, Parametrized]) -> dict[str, Choices]:
        return {name: layer.made_by for name, layer in layers.items() if isinstance(layer.made_by, Choices)}

    def constraints(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        forms = {name: Form.parse(text) for name, text in self.forms.items()}
        return {
            name: InFormat(self.sites[name], form.format, form.rank)
            for name, form in forms.items()
            if form != DENSE
        }

    def facts(self) -> dict[str, Any]:
        return {"forms": self.forms}

    def recall(self, facts: Mapping[str, Any]) -> None:
        self.forms = dict(facts["forms"])

    def merged(self, model: nn.Module) -> nn.Module:
        trained = super().merged(model)
        self._settle(parametrized(trained, self.sites))
        return self.dense.holding(dense_values(trained, self.dense.names), trained.training)

    def close(self, model: nn.Module) -> Artifact:
        artifact = super().close(model)
        chosen = {
            name: self.tariff.sure(self.sites[name], Form.parse(text)) for name, text in self.forms.items()
        }
        dense = {name: menu.costs[0] for name, menu in self.menus.items()}
        batch, largest = (
            self.batches[0] if self.batches else self.opened.example(),
            max(dense, key=lambda name: dense[name]),
        )
        Assembled(self.tariff, dense, chosen).weigh(self.opened, artifact, batch, self.sites[largest])
        count, times = (
            sum(len(menu.forms) for menu in self.menus.values()),
            f"{self.trains / self.replaces:.2f} times those of the dense model",
        )
        artifact.report.note(
            f"{self.name} chose among {count} forms of {len(self.menus)} sites and trained {self.trains:,} "
            f"parameters, {times}"
        )
        if self.answers is None:
            artifact.report.note(
                "without calibration data the forms were chosen on the batches that the weights learned from"
            )
        return artifact
