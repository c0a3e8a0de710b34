"""What a number type is: the tensors that stand for a factor, and how they are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.ops import Ops, V
from tdpass.registry import Registry

Shape = tuple[int, ...]
VALUES = "values"


@dataclass(frozen=True)
class Part:
    """One stored tensor: its shape and type."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes in memory and in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Numbers(ABC):
    """One number type with its granularity; a frozen dataclass per file, registered with `register_numbers`.

    Class attributes: `name`, and `bits` of one value.  `str` is the text that `numbers_named` reads.
    """

    name: ClassVar[str]
    bits: ClassVar[int]

    @classmethod
    @abstractmethod
    def read(cls, options: Sequence[str]) -> Self:
        """From what follows the name, split at `/`; raises `ValueError` with what is allowed."""

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, Part]:
        """What is stored for a factor of that shape, the values first; raises `PlanError` for a shape it does not divide."""

    @abstractmethod
    def store(self, factor: Tensor) -> dict[str, Tensor]:
        """The parts of a factor of floating-point numbers, rounded to the nearest."""

    @abstractmethod
    def restore(self, ops: Ops[V], parts: Mapping[str, V], shape: Shape, dtype: torch.dtype) -> V:
        """The factor that the parts stand for, in a floating-point type."""

    def bytes(self, shape: Shape) -> int:
        """Bytes of all parts of a factor of that shape."""
        return sum(part.bytes for part in self.parts(shape).values())


NUMBERS: Registry[type[Numbers]] = Registry("number type")


def register_numbers(cls: type[Numbers]) -> type[Numbers]:
    """Class decorator: make a number type known by its `name`."""
    return NUMBERS.add(cls.name, cls)


def numbers_named(text: str) -> Numbers:
    """Read `int8`, `int8/tensor`, `int4/64` or `int8/zero`; raises `PlanError` for what is no number type."""
    name, *options = text.split("/")
    if name not in NUMBERS:
        raise PlanError(f"unknown number type {text!r}; known: {', '.join(NUMBERS.names())}")
    try:
        return NUMBERS.get(name).read(options)
    except ValueError as error:
        raise PlanError(f"number type {text!r} is not understood: {error}") from None
