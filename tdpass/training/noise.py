"""Weights that a model computes with as a device would hold them, differently in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tdpass.training.placement import placed_like, whole
from tdpass.training.terms import State, Term


class NoisyWeights(Term):
    """The model computes with  W exp(sigma z),  and the gradient there moves W.

    z is standard normal and drawn anew for every step. So a network learns to do with conductances that vary
    (log-normal, as of memristors).  `inner` are the other terms, which see W; W is what the weights are at
    the end, and in `state`.  The draws are the same on every process and after an interruption.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], sigma: float, inner: Sequence[Term] = ()) -> None:
        self.weights, self.sigma, self.inner = dict(weights), sigma, tuple(inner)
        self.values = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.steps = 0

    def begin_round(self, progress: float) -> None:
        self._clean()
        for term in self.inner:
            term.begin_round(progress)
        self._disturb()

    def before_step(self, optimizer: Optimizer) -> None:
        self._clean()
        for term in self.inner:
            term.before_step(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        for term in self.inner:
            term.after_step(optimizer)
        self.steps += 1
        self._disturb()

    def end(self) -> None:
        self._clean()
        for term in self.inner:
            term.end()

    def residuals(self) -> Mapping[str, float]:
        return {name: value for term in self.inner for name, value in term.residuals().items()}

    def state(self) -> State:
        state: State = {
            "steps": self.steps,
            **{f"value.{name}": value for name, value in self.values.items()},
        }
        for number, term in enumerate(self.inner):
            state |= {f"{number}.{key}": value for key, value in term.state().items()}
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.values = {name: state[f"value.{name}"] for name in self.weights}
        for number, term in enumerate(self.inner):
            term.load_state(
                {
                    key.removeprefix(f"{number}."): value
                    for key, value in state.items()
                    if key.startswith(f"{number}.")
                }
            )

    @torch.no_grad()
    def _clean(self) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.values[name])

    @torch.no_grad()
    def _disturb(self) -> None:
        """Keep the weights as they are, and put what a device would hold of them in their place."""
        generator = torch.Generator().manual_seed(self.steps)
        for name, weight in self.weights.items():
            self.values[name] = weight.detach().clone()
            shape = whole(weight.detach()).shape
            noise = (
                torch.randn(shape, generator=generator)
                .mul_(self.sigma)
                .exp_()
                .to(weight.device, weight.dtype)
            )
            weight.mul_(placed_like(noise, weight))
