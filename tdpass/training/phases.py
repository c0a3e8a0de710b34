"""Phases of a method: one set of terms after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tdpass.training.averaging import Average
from tdpass.training.schedules import Schedule
from tdpass.training.terms import State, Term


@dataclass(frozen=True)
class Phase:
    """`rounds` rounds under the terms that `begin` makes; `rate` is a factor on the learning rate."""

    name: str
    rounds: int
    begin: Callable[[], Sequence[Term]]
    rate: float = 1.0


class Phased(Term):
    """One phase after another, each begun when the rounds of the one before are over; the last goes on.

    With an `average` every phase ends with the average of its weights. `facts` are JSON values that belong to
    the state besides that of the terms; `recall` takes them up before a phase is begun.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        facts: Callable[[], Mapping[str, Any]] = dict,
        recall: Callable[[Mapping[str, Any]], None] = lambda facts: None,
    ) -> None:
        self._facts, self._recall = facts, recall
        self.phases = tuple(phase for phase in phases if phase.rounds > 0)
        self.rounds = sum(phase.rounds for phase in self.phases)
        self.round = 0
        self.index = -1
        self.terms: tuple[Term, ...] = ()
        self.average: Average | None = None

    def place(self, rounds: float) -> tuple[int, float]:
        """(index of the phase, share of it that is over) after that many rounds."""
        for index, phase in enumerate(self.phases):
            if rounds < phase.rounds:
                return index, rounds / phase.rounds
            rounds -= phase.rounds
        return len(self.phases) - 1, 1.0

    def rate(self, schedule: Schedule) -> Callable[[float], float]:
        """The schedule run once per phase, as a function of the share of all rounds that is over."""

        def value(progress: float) -> float:
            index, inner = self.place(progress * self.rounds)
            return schedule.value(inner) * self.phases[index].rate

        return value

    def begin_round(self, progress: float) -> None:
        index, inner = self.place(self.round)
        if index != self.index:
            self.end()
            self.index, self.terms = index, tuple(self.phases[index].begin())
            if self.average is not None:
                self.average.restart()
        for term in self.terms:
            term.begin_round(inner)
        self.round += 1

    def loss(self, inputs: object, outputs: object) -> Tensor | None:
        found = [extra for term in self.terms if (extra := term.loss(inputs, outputs)) is not None]
        return torch.stack(found).sum() if found else None

    def before_step(self, optimizer: Optimizer) -> None:
        for term in self.terms:
            term.before_step(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        for term in self.terms:
            term.after_step(optimizer)
        if self.average is not None:
            self.average.update()

    def end(self) -> None:
        for term in self.terms:
            term.end()
        if self.average is not None and self.index >= 0:
            self.average.put()

    def residuals(self) -> Mapping[str, float]:
        return {name: value for term in self.terms for name, value in term.residuals().items()}

    def state(self) -> State:
        state: State = {"round": self.round, "index": self.index, "facts": dict(self._facts())}
        for number, term in enumerate(self.terms):
            state |= {f"{number}.{key}": value for key, value in term.state().items()}
        if self.average is not None:
            state |= {
                "steps": self.average.steps,
                **{f"average.{name}": value for name, value in self.average.values.items()},
            }
        return state

    def resume_at(self, facts: Mapping[str, Any]) -> None:
        self.round, self.index = int(facts["round"]), int(facts["index"])
        self._recall(facts["facts"])
        self.terms = tuple(self.phases[self.index].begin()) if self.index >= 0 else ()
        for number, term in enumerate(self.terms):
            term.resume_at(_own(facts, number))

    def load_state(self, state: Mapping[str, Any]) -> None:
        for number, term in enumerate(self.terms):
            term.load_state(_own(state, number))
        if self.average is not None:
            self.average.load(_own(state, "average"), int(state["steps"]))


def _own(state: Mapping[str, Any], owner: int | str) -> dict[str, Any]:
    start = f"{owner}."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}
