"""Weights that keep their signs while they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tdpass.training.terms import State, Term


class FixedSigns(Term):
    """After every step  W <- s max(0, s W)  with the signs s that the weights begin with.

    Zeros stay, and nothing changes sides.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self.signs = {name: weight.detach().sign() for name, weight in self.weights.items()}

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        for name, weight in self.weights.items():
            weight.copy_((weight * self.signs[name]).clamp_min_(0).mul_(self.signs[name]))

    def state(self) -> State:
        return {f"sign.{name}": sign for name, sign in self.signs.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.signs = {name: state[f"sign.{name}"] for name in self.weights}
