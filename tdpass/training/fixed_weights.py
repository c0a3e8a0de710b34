"""Weights held at values while the others train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdpass.constraints.base import Constraint
from tdpass.constraints.magnitudes import rank_within
from tdpass.training.placement import placed_like, whole
from tdpass.training.terms import State, Term


class FixedWeights(Term):
    """After every step  W[mask] <- value[mask].

    Starts with the zeros of each weight held at zero, which keeps a pruned model pruned.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self.values: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in self.weights.items()
        }
        self.masks: dict[str, Tensor] = {name: value == 0 for name, value in self.values.items()}

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        for name, weight in self.weights.items():
            weight.copy_(torch.where(self.masks[name], self.values[name], weight))

    def state(self) -> State:
        masks: State = {f"mask.{name}": mask for name, mask in self.masks.items()}
        return {**masks, **{f"value.{name}": value for name, value in self.values.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.masks = {name: state[f"mask.{name}"] for name in self.weights}
        self.values = {name: state[f"value.{name}"] for name in self.weights}


class ProgressiveFixing(FixedWeights):
    """More and more weights are put where a constraint wants them and stay there, those nearest to it first.

    With `constraints` of fixed structure (levels of a fixed interval, say), a share of every level's weights
    is held from the beginning of a round on (ADMM-NN's progressive fixing): `first`, then evenly more, and
    all of them from `reach` of the phase on, so that what is never held (biases, norms) still trains around
    the last ones, which moved most.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        constraints: Mapping[str, Constraint],
        first: float = 0.3,
        reach: float = 0.8,
    ) -> None:
        super().__init__(weights)
        self.constraints, self.first, self.reach = dict(constraints), first, reach

    @torch.no_grad()
    def begin_round(self, progress: float) -> None:
        share = self.first + (1 - self.first) * min(1.0, progress / self.reach)
        for name, constraint in self.constraints.items():
            weight = self.weights[name]
            full, held = whole(weight.detach()), whole(self.masks[name])
            levels = torch.where(held, whole(self.values[name]), constraint.project(full))
            rank, size = rank_within(levels, (full - levels).abs().masked_fill(held, -1))
            mask = held | ((levels != 0) & (rank < (share * size).round()))
            self.values[name], self.masks[name] = placed_like(levels, weight), placed_like(mask, weight)
            weight.copy_(torch.where(self.masks[name], self.values[name], weight))
