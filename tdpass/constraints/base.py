"""What a constraint is: a set of weights and the projection onto it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from tdpass.errors import InvalidModelError
from tdpass.registry import Registry


class Constraint(ABC):
    """A set of weights.

    Frozen dataclasses subclass it, one file per set, registered with `register_constraint` by `name`.
    """

    name: ClassVar[str]

    @abstractmethod
    def project(self, weight: Tensor) -> Tensor:
        """The nearest allowed weight in the Frobenius norm, or as near as the method's theory gives.

        Same shape, dtype and device. The input is not changed.  Raises `InvalidModelError` where it holds
        infinities or NaN.
        """

    def frozen(self, weight: Tensor) -> Constraint:
        """The constraint with what projection chooses (mask, interval) fixed as in an allowed `weight`."""
        return self

    @abstractmethod
    def __str__(self) -> str:
        """Short text such as `tucker2 (8, 12)` or `5,000 weights`."""


class Shared(ABC):
    """A budget that several weights share."""

    @abstractmethod
    def divide(self, weights: Mapping[str, Tensor]) -> dict[str, Constraint]:
        """One constraint for each weight, chosen from all of them together.

        Raises `BudgetError` where no choice fits.
        """


CONSTRAINTS: Registry[type[Constraint]] = Registry("constraint")


def register_constraint(cls: type[Constraint]) -> type[Constraint]:
    """Class decorator: make a constraint known by its `name`."""
    CONSTRAINTS.add(cls.name, cls)
    return cls


def checked(weight: Tensor) -> Tensor:
    """The weight without gradient, in float32 or more.

    Raises `InvalidModelError` where a value is not finite.
    """
    weight = weight.detach()
    low, high = torch.aminmax(weight)
    if not bool(low.isfinite() & high.isfinite()):
        raise InvalidModelError(
            f"a weight of shape {tuple(weight.shape)} holds values from {float(low)} to {float(high)}; only "
            "finite ones can be projected; "
            "lower the learning rate or the penalty that made it diverge"
        )
    return weight if weight.dtype.itemsize >= 4 else weight.float()
