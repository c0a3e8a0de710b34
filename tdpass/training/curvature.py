"""How much the loss bends along each weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdpass.training.placement import whole
from tdpass.training.terms import State, Term

Metric = Literal["frobenius", "fisher"]


class Curvature(Term):
    """F <- d F + (1 - d) g^2 after every back-propagation, g the gradient of a batch.

    The diagonal of the Fisher information, up to a factor. Moving a weight by e costs about F e^2 / 2 (LeCun,
    Denker, Solla 1989), so `sum F (W - Z)^2` measures what a projection loses where the Frobenius norm does
    not.  Comes before terms that change gradients.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float = 0.999) -> None:
        self.weights, self.decay, self.steps = dict(weights), decay, 0
        self.squares = {
            name: torch.zeros_like(weight, requires_grad=False) for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        self.steps += 1
        decay = min(self.decay, 1 - 1 / self.steps)
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.squares[name].mul_(decay).addcmul_(weight.grad, weight.grad, value=1 - decay)

    def known(self) -> dict[str, Tensor]:
        """F of each weight, whole; nothing before the first gradients.

        A collective call where weights are sharded.
        """
        return {name: whole(value) for name, value in self.squares.items()} if self.steps else {}

    def sensitivity(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """||W||^2 mean(F) over what is not zero in each of these whole weights.

        What losing all of one costs, up to a factor.
        """
        known = self.known()
        return {
            name: float(weight.square().sum() * known[name][weight != 0].mean())
            for name, weight in weights.items()
            if name in known
        }

    def state(self) -> State:
        return {"steps": self.steps, **{f"square.{name}": value for name, value in self.squares.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.squares = {name: state[f"square.{name}"] for name in self.weights}
