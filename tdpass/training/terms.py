"""A term: what a training method adds to a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State: TypeAlias = dict[str, Any]  # tensors, and JSON values


class Term:
    """Something that acts on the weights or on the loss while a model trains; the base does nothing.

    `begin_round` is called before the first step of every round (an epoch, unless said otherwise) with the
    share of the phase that is over, in [0, 1); `before_step` after back-propagation and clipping, when
    gradients are there; `after_step` after the optimizer.  All of it happens alike on every process.
    `replaces` is the share of the task's own loss that `loss` stands for.
    """

    replaces: float = 0.0

    def loss(self, inputs: object, outputs: object) -> Tensor | None:
        """What is added to the loss of a batch."""
        return None

    def begin_round(self, progress: float) -> None:
        """A round of the phase begins."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Gradients may be changed."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Weights may be changed."""

    def end(self) -> None:
        """Training is over; weights may be changed once more."""

    def residuals(self) -> Mapping[str, float]:
        """Relative distance to each constraint, by weight."""
        return {}

    def state(self) -> State:
        """What a checkpoint must hold to go on from here."""
        return {}

    def resume_at(self, facts: Mapping[str, Any]) -> None:
        """Take the form it had when `state` was read, given what there was in it besides tensors.

        `load_state` follows.
        """

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class Hooks:
    """Terms tied to an optimizer: they act around its `step`, whoever calls it.

    A round begins before those steps, counted from 0, for which `starts` is true; there are `rounds` in all.
    `remove` unties them.
    """

    def __init__(
        self, optimizer: Optimizer, terms: Iterable[Term], starts: Callable[[int], bool], rounds: int
    ) -> None:
        self.optimizer, self.terms, self.starts, self.rounds = optimizer, tuple(terms), starts, rounds
        self.steps = self.round = 0
        before = optimizer.register_step_pre_hook(lambda given, args, kwargs: self._before(given))
        after = optimizer.register_step_post_hook(lambda given, args, kwargs: self._after(given))
        self._handles = (before, after)

    @torch.no_grad()
    def _before(self, optimizer: Optimizer) -> None:
        if self.starts(self.steps):
            for term in self.terms:
                term.begin_round(min(1.0, self.round / self.rounds))
            self.round += 1
        for term in self.terms:
            term.before_step(optimizer)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        for term in self.terms:
            term.after_step(optimizer)
        self.steps += 1

    def moves(self, weight: nn.Parameter) -> bool:
        """Whether a step of the optimizer changes that weight."""
        return weight.requires_grad and any(
            parameter is weight for group in self.optimizer.param_groups for parameter in group["params"]
        )

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()


def rate_of(optimizer: Optimizer, weight: nn.Parameter) -> float:
    """The learning rate at which an optimizer moves that weight; 0 for one it does not know."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return float(group["lr"])
    return 0.0
