"""Weights averaged over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tdpass.errors import UsageError
from tdpass.training.placement import bare

_START = 10


class Average:
    """A <- d A + (1 - d) W after every step, with d = min(decay, n / (n + 10)) after n steps.

    So the beginning is soon forgotten. Polyak and Juditsky 1992, with exponential weights.  Statistics of
    batch-norms are averaged as weights are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise UsageError(
                f"average={decay!r} is not a decay between 0 and 1; 0.998 averages over about 500 steps"
            )
        self.decay, self.steps = decay, 0
        plain = bare(model)
        self._tensors = {
            name: tensor
            for name, tensor in (*plain.named_parameters(), *plain.named_buffers())
            if tensor.is_floating_point()
        }
        self.values: dict[str, Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget what was; the average is the weights as they are."""
        self.values = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after one more step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + _START))
        for name, tensor in self._tensors.items():
            self.values[name].mul_(decay).add_(tensor, alpha=1 - decay)

    @torch.no_grad()
    def put(self) -> None:
        """Make the weights what their average is."""
        for name, tensor in self._tensors.items():
            tensor.copy_(self.values[name])

    def load(self, values: Mapping[str, Tensor], steps: int) -> None:
        """Go on from there."""
        self.values, self.steps = {name: values[name] for name in self._tensors}, steps
