"""Choices that are learned while the weights are.

Gumbel-softmax, expected cost, and candidates drawn to the original layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from tdpass.training.calls import class_scores
from tdpass.training.choices import Choices, Draw
from tdpass.training.learning import Learning
from tdpass.training.parametrized import Parametrized
from tdpass.training.placement import placed_like, whole
from tdpass.training.schedules import Schedule
from tdpass.training.terms import State, Term

# a form that loses a tenth of the weight's energy begins e times less likely than one that loses nothing
TENTH = 0.1
_HIGHEST, _HALVINGS = 1e3, 40


class Call(Protocol):
    """Positional and named inputs of one call of a model."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional ones."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Named ones."""


@dataclass(frozen=True)
class Prices:
    """What each form of each layer costs, as shares of all layers' dense cost, and what all shall cost.

    A form that loses `unit` more than another begins e times less likely.
    """

    costs: Mapping[str, Tensor]
    goal: float = 0.0
    unit: float = TENTH

    def charge(self, logits: Mapping[str, Tensor]) -> Tensor:
        """How far the expected cost sum_l sum_c softmax(logits_l)_c cost_lc is from the goal."""
        return (self._expected(logits) - self.goal).abs()

    def meeting(self, losses: Mapping[str, Tensor]) -> float:
        """The least price, the same for all, at which the expected cost of forms meets the goal.

        The forms are begun at `logits`.
        """
        low, high = 0.0, _HIGHEST
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = self._expected(self.logits(losses, middle)) > self.goal
            low, high = (middle, high) if above else (low, middle)
        return high

    def logits(self, losses: Mapping[str, Tensor], price: float) -> dict[str, Tensor]:
        """-(loss + price * cost) / unit of forms that lose this much.

        A search that began with all forms alike would train the weights under mixtures that answer nothing.
        """
        return {
            name: -(found + price * self.costs[name].to(found)) / self.unit for name, found in losses.items()
        }

    def worth(self, logits: Mapping[str, Tensor], price: float) -> dict[str, Tensor]:
        """Logits without the price that they began at, for a choice that is held to a budget by itself."""
        return {
            name: found + price * self.costs[name].to(found) / self.unit for name, found in logits.items()
        }

    def _expected(self, logits: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(
            [torch.softmax(logits[name], 0) @ costs.to(logits[name]) for name, costs in self.costs.items()]
        ).sum()


@dataclass(frozen=True)
class Answers:
    """Calls that no weight learns from, and the class scores that the dense model answers them with."""

    calls: Sequence[Call]
    scores: Sequence[Tensor]

    def divergence(self, network: nn.Module, number: int) -> Tensor:
        """KL(dense || network) of the class probabilities of one call, in turn.

        Batch-norms use the call's own statistics.
        """
        asked = self.calls[number % len(self.calls)]
        with judged(network):
            scores = class_scores(network(*asked.args, **asked.kwargs)).float().flatten(0, -2)
        wanted = self.scores[number % len(self.calls)].float().flatten(0, -2)
        return F.kl_div(
            F.log_softmax(scores, -1), F.log_softmax(wanted, -1), reduction="batchmean", log_target=True
        )


class RankSearch(Learning):
    """Learns the logits of every layer's forms, and draws how the weights are mixed in the next step.

    y_l = sum_c p_lc T_lc(x) with p_l = softmax((alpha_l + g) / tau) and Gumbel noise g, drawn anew for every
    step (Jang, Gu, Poole 2017); tau falls from round to round.  Between steps of the weights, every `every`
    of them, alpha takes a step on KL(dense || network) + penalty * E[cost], on the `answers` to data that the
    weights do not see.  Without answers it learns from the same batches as the weights do, in the same
    backward pass.  It begins at `begins`; `every` of 0 only draws.
    """

    def __init__(
        self, network: nn.Module, layers: Mapping[str, Choices], begins: Mapping[str, Tensor], prices: Prices,
        temperature: Schedule,
        *, rate: float, penalty: float, every: int, answers: Answers | None = None,
    ) -> None:  # fmt: skip
        self.network, self.layers, self.prices, self.temperature = network, dict(layers), prices, temperature
        self.penalty, self.every, self.answers, self.steps = penalty, every, answers, 0
        for name, layer in self.layers.items():
            if layer.draw is None:
                layer.draw = Draw(nn.Parameter(begins[name].clone()), torch.zeros_like(begins[name]))
        self.draws = {name: layer.draw for name, layer in self.layers.items() if layer.draw is not None}
        logits = {name: draw.logits for name, draw in self.draws.items()}
        super().__init__(logits, torch.optim.Adam(logits.values(), rate))
        for draw in self.draws.values():
            draw.live = bool(every) and answers is None
            draw.temperature = temperature.value(0.0)
        self._draw()

    def begin_round(self, progress: float) -> None:
        for draw in self.draws.values():
            draw.temperature = self.temperature.value(progress)

    def after_step(self, optimizer: Optimizer) -> None:
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            with torch.enable_grad():
                self._add_gradients()
            super().after_step(optimizer)
        self._draw()

    def _add_gradients(self) -> None:
        for draw in self.draws.values():
            draw.live = True
        loss = self.penalty * self.prices.charge(self.parameters)
        if self.answers is not None:
            loss = loss + self.answers.divergence(self.network, self.steps // self.every)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for draw, gradient in zip(self.draws.values(), gradients, strict=True):
            draw.live = self.answers is None
            if gradient is not None:
                before = draw.logits.grad
                draw.logits.grad = gradient if before is None else before + gradient

    @torch.no_grad()
    def _draw(self) -> None:
        for draw in self.draws.values():
            uniform = torch.rand_like(draw.noise).clamp(1e-9, 1 - 1e-9)
            draw.noise = -(-uniform.log()).log()

    def state(self) -> State:
        noise: State = {f"noise.{name}": draw.noise for name, draw in self.draws.items()}
        temperature = next(draw.temperature for draw in self.draws.values())
        return {**super().state(), **noise, "steps": self.steps, "temperature": temperature}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.steps = int(state["steps"])
        for name, draw in self.draws.items():
            draw.noise, draw.temperature = state[f"noise.{name}"], float(state["temperature"])


class Approach(Term):
    """Adds the gradient of a pull of each mixture's weights to the original ones.

    That is  strength * sum_l ||(W_lc - V_l) C_l^1/2||^2 / ||V_l C_l^1/2||^2,  c drawn from softmax(alpha_l).
    V is the weight that the layer began with and C the second moments of what it read then (or the identity),
    so that on average this is  sum_l sum_c p_lc ||T_lc(x) - V_l x||^2  of the layer's outputs: every
    candidate is drawn to answer as the original layer does, which keeps candidates that share factors from
    pulling these apart.
    """

    def __init__(
        self, layers: Mapping[str, Parametrized], originals: Mapping[str, Tensor], strength: float
    ) -> None:
        self.layers, self.originals, self.strength = dict(layers), dict(originals), strength
        self.moments = {name: _moments(self._choices(name)) for name in self.layers}
        self.sizes = {
            name: _size(weight, self.moments[name]).clamp_min(1e-30)
            for name, weight in self.originals.items()
        }

    @torch.no_grad()
    def distances(self, name: str) -> Tensor:
        """The relative squared distance of each candidate of a layer."""
        choices, parts = self._choices(name), self.layers[name].originals
        gaps = [choices.one(k, *parts) - self.originals[name] for k in range(len(choices.forms))]
        return torch.stack([_size(gap, self.moments[name]) for gap in gaps]) / self.sizes[name]

    def before_step(self, optimizer: Optimizer) -> None:
        for name, layer in self.layers.items():
            choices = self._choices(name)
            if choices.draw is None or not self.strength:
                continue
            index = int(torch.multinomial(torch.softmax(choices.draw.logits.detach(), 0), 1))
            with torch.enable_grad():
                parts = [whole(original.detach()).requires_grad_() for original in layer.originals]
                gap = choices.one(index, *parts) - self.originals[name].to(parts[0])
                loss = self.strength * _size(gap, self.moments[name]) / self.sizes[name]
                slopes = torch.autograd.grad(loss, parts, allow_unused=True)
            for original, slope in zip(layer.originals, slopes, strict=True):
                if slope is not None and original.grad is not None:
                    original.grad.add_(placed_like(slope, original))

    @torch.no_grad()
    def residuals(self) -> Mapping[str, float]:
        """How far each weight, mixed without noise, is from its likeliest candidate, over the sum of norms.

        That sum is of both norms.
        """
        found = {}
        for name, layer in self.layers.items():
            choices, parts = self._choices(name), [whole(original.detach()) for original in layer.originals]
            if choices.draw is not None:
                likely = choices.one(int(choices.draw.logits.argmax()), *parts)
                shares = torch.softmax(choices.draw.logits / choices.draw.temperature, 0)
                mixed = choices.mixed(shares, *parts)
                found[name] = float((mixed - likely).norm() / (mixed.norm() + likely.norm()).clamp_min(1e-30))
        return found

    def _choices(self, name: str) -> Choices:
        found = self.layers[name].made_by
        assert isinstance(found, Choices)
        return found


def _moments(choices: Choices) -> Tensor | None:
    inputs = choices.metric.inputs
    return None if inputs is None else inputs.float()


def _size(weight: Tensor, moments: Tensor | None) -> Tensor:
    """||W C^1/2||^2."""
    rows = weight.flatten(1).float()
    if moments is None:
        return rows.square().sum()
    moved = rows * moments if moments.dim() == 1 else rows @ moments
    return (moved * rows).sum()


@contextmanager
def judged(network: nn.Module) -> Iterator[None]:
    """Run a network as it is judged.

    In evaluation, but mixed as it is drawn, batch-norms on the statistics of what they read.
    """
    training = {module: module.training for module in network.modules()}
    norms = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    network.eval()
    for module in network.modules():
        if isinstance(module, Choices | _BatchNorm):
            module.training = True
    for norm in norms:
        norm.track_running_stats = False  # else running statistics would be those of this data
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, was in training.items():
            module.training = was
