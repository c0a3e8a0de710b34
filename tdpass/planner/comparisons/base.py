"""What compares one output of a network with the original's, fitted to the original's answers.

A comparison gives one number per row, where a row is what is judged at once: a distribution over classes, one
position with all its channels, an embedding.  Sums over rows do not depend on how samples were put into
calls, or in which order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.planner.answers import Answers
from tdpass.registry import Registry


class Comparison(ABC):
    """How far an output is from its reference; `reference` and `output` are float64 and of one shape."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def fit(cls, answers: Answers) -> Self:
        """The comparison for an output whose values on all data are these."""

    @property
    def classes(self) -> int | None:
        """The axis over which classes compete; None where there is none."""
        return None

    @property
    @abstractmethod
    def gain(self) -> float:
        """What a probe counts: rows change by about E[gain (probe . d)^2] where the output does by d."""

    @abstractmethod
    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        """Divergence of every row, in one axis."""

    def count(self, reference: Tensor) -> int:
        """How many rows there are."""
        return reference.numel() // (1 if self.classes is None else max(reference.shape[self.classes], 1))

    @abstractmethod
    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """A random direction in output space, as long as the divergence is curved there."""

    def by_channel(self, reference: Tensor, output: Tensor) -> Tensor | None:
        """The mean over rows of each channel's part; None where channels have no scales of their own."""
        return None


class Unfitted(Comparison):
    """A comparison that depends on no answers, and whose rows change by half of (probe . d)^2."""

    @property
    def gain(self) -> float:
        return 0.5

    @classmethod
    def fit(cls, answers: Answers) -> Self:
        """Nothing depends on the answers."""
        return cls()


COMPARISONS: Registry[type[Comparison]] = Registry("divergence")

C = TypeVar("C", bound=type[Comparison])


def register_comparison(cls: C) -> C:
    """Class decorator: make a comparison known by its name."""
    COMPARISONS.add(cls.name, cls)
    return cls


def normal(reference: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape of the reference."""
    return torch.randn(reference.shape, generator=generator, dtype=reference.dtype)
