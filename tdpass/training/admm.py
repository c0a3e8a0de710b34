"""ADMM: weights drawn to sets they shall end in, while they train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdpass.errors import UsageError
from tdpass.training.placement import placed_like, whole
from tdpass.training.rules import Rule, projections
from tdpass.training.schedules import Constant, Schedule
from tdpass.training.terms import State, Term, rate_of


@dataclass
class Split:
    """One weight W and one set it is drawn to.

    The copy Z in the set, the scaled dual U, and the `goal` Z - U; laid out as W is.
    """

    name: str
    weight: nn.Parameter
    z: Tensor
    u: Tensor
    goal: Tensor = field(init=False)
    residual: float = float("nan")
    bound: bool = False


class Admm(Term):
    """min f(W) over W in S, as f(W) + rho/2 ||W - Z + U||^2 with Z in S (Boyd et al. 2011, section 9.1).

    At the beginning of every round  Z <- project(W + U),  U <- U + W - Z,  but in the first, before which W
    has not moved, U stays zero: otherwise W would be drawn past Z, to 2 Z - W, by as much as it is away from
    it.  In between, every step adds rho (W - Z + U) to the gradient, or with `decoupled` (for optimizers that
    rescale gradients, such as Adam) moves the weight after the step by the proximal map  W <- (W + s (Z - U))
    / (1 + s)  with  s = rate * rho.  When rho changes U is rescaled, since it is U = dual / rho.

    `weights` by name; each of `rules` names constraints for some or all of them and adds a copy and a dual of
    its own, so sets compose by listing.  A rule is asked anew in each round, with the weights W + U it is
    about to project.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        rules: Sequence[Rule],
        rho: Schedule | float,
        decoupled: bool = False,
    ) -> None:
        if not weights:
            raise UsageError(
                "there is no weight to constrain; name sites with include=, or leave fewer out with exclude="
            )
        self.rules = tuple(rules)
        self.schedule = Constant(rho) if isinstance(rho, int | float) else rho
        self.decoupled = decoupled
        self.rho = self.schedule.value(0.0)
        self.splits = [
            [
                Split(name, weight, weight.detach().clone(), torch.zeros_like(weight))
                for name, weight in weights.items()
            ]
            for _ in self.rules
        ]

    @torch.no_grad()
    def begin_round(self, progress: float) -> None:
        rho = self.schedule.value(progress)
        if rho != self.rho:
            for splits in self.splits:
                for split in splits:
                    split.u.mul_(self.rho / rho)
        self.rho = rho
        for rule, splits in zip(self.rules, self.splits, strict=True):
            self._project(rule, splits, progress)
        self._aim()

    def _aim(self) -> None:
        """Work out Z - U once for all steps of a round."""
        for split in self._active():
            split.goal = split.z - split.u

    def _project(self, rule: Rule, splits: Sequence[Split], progress: float) -> None:
        found = projections(
            rule, progress, {split.name: whole(split.weight.detach() + split.u) for split in splits}
        )
        for split in splits:
            if split.name in found:
                split.z = placed_like(found[split.name], split.weight)
                gap = split.weight.detach() - split.z
                if split.bound:
                    split.u.add_(gap)
                split.bound = True
                split.residual = float(
                    whole(gap.norm()) / whole(split.weight.detach().norm()).clamp_min(1e-30)
                )

    def _active(self) -> list[Split]:
        return [split for splits in self.splits for split in splits if split.bound]

    def before_step(self, optimizer: Optimizer) -> None:
        if self.decoupled:
            return
        for split in self._active():
            if split.weight.grad is not None:
                split.weight.grad.add_(split.weight - split.goal, alpha=self.rho)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        if not self.decoupled:
            return
        for split in self._active():
            pull = self.rho * rate_of(optimizer, split.weight)
            split.weight.lerp_(split.goal, pull / (1 + pull))

    def residuals(self) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for split in self._active():
            found[split.name] = max(split.residual, found.get(split.name, 0.0))
        return found

    def state(self) -> State:
        state: State = {"rho": self.rho}
        for index, splits in enumerate(self.splits):
            for split in splits:
                state[f"z.{index}.{split.name}"], state[f"u.{index}.{split.name}"] = split.z, split.u
                state[f"bound.{index}.{split.name}"], state[f"residual.{index}.{split.name}"] = (
                    split.bound,
                    split.residual,
                )
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        self.rho = float(state["rho"])
        for index, splits in enumerate(self.splits):
            for split in splits:
                split.z = state[f"z.{index}.{split.name}"]
                split.u = state[f"u.{index}.{split.name}"]
                split.bound, split.residual = (
                    bool(state[f"bound.{index}.{split.name}"]),
                    float(state[f"residual.{index}.{split.name}"]),
                )
        self._aim()
