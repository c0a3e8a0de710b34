"""Pruned weights that can come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tdpass.training.placement import placed_like, whole
from tdpass.training.rules import Rule, projections
from tdpass.training.terms import State, Term


class Surgery(Term):
    """The model computes with Z = V * mask, and the gradient at Z moves all of V.

    Dynamic network surgery (Guo, Yao, Chen 2016). At the beginning of every round the mask becomes what the
    constraints of `rule` leave of V, so a weight that was cut too soon grows until it is taken back.  The
    weights of the model are Z; V is in `state`.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], rule: Rule) -> None:
        self.weights, self.rule = dict(weights), rule
        self.values = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.masks = {
            name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()
        }
        self._residuals: dict[str, float] = {}

    @torch.no_grad()
    def begin_round(self, progress: float) -> None:
        full = {name: whole(value) for name, value in self.values.items()}
        for name, kept in projections(self.rule, progress, full).items():
            self.masks[name] = placed_like(kept != 0, self.weights[name])
            self._residuals[name] = float((full[name] - kept).norm() / full[name].norm().clamp_min(1e-30))

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.values[name])

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        for name, weight in self.weights.items():
            self.values[name].copy_(weight)
            weight.mul_(self.masks[name])

    def residuals(self) -> Mapping[str, float]:
        return self._residuals

    def state(self) -> State:
        masks: State = {f"mask.{name}": mask for name, mask in self.masks.items()}
        return {
            **masks,
            **{f"value.{name}": value for name, value in self.values.items()},
            "residuals": dict(self._residuals),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.masks = {name: state[f"mask.{name}"] for name in self.weights}
        self.values = {name: state[f"value.{name}"] for name in self.weights}
        self._residuals = dict(state["residuals"])
