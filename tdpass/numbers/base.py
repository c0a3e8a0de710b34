"""What a number type is: the tensors that stand for a factor, and how they are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.ops import StorageOps, TorchOps, V
from tdpass.registry import Registry

Shape = tuple[int, ...]
VALUES, SCALE = "values", "scale"


@dataclass(frozen=True)
class Part:
    """One stored tensor: its shape and type."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes in memory and in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Earlier:
    """A part as versions before this one stored it, and what makes the part of it that this one stores."""

    part: Part
    renewed: Callable[[Tensor], Tensor]


class Numbers(ABC):
    """One number type with its granularity; a frozen dataclass per file, registered with `register_numbers`.

    Class attributes: `name`, `bits` of one value, which may be a property, and whether values are
    `floating`-point numbers; `opset` is the version of ONNX's operators from which on they are read.  `str`
    is the text that `numbers_named` reads.
    """

    name: ClassVar[str]
    floating: ClassVar[bool] = False
    opset: ClassVar[int] = 1

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one value."""

    @classmethod
    @abstractmethod
    def read(cls, options: Sequence[str]) -> Self:
        """From what follows the name, split at `/`; raises `ValueError` with what is allowed."""

    @abstractmethod
    def parts(self, shape: Shape, kept: int | None = None) -> dict[str, Part]:
        """What is stored for a factor of that shape, the values first.

        Raises `PlanError` for a shape it does not divide. `kept` is how many values are stored of a factor
        with a support.
        """

    @abstractmethod
    def fit(self, factor: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        """The parts beside the values, such as scales, that suit a factor of floating-point numbers.

        `weights`, of its shape, say how much the squared error of each number counts, 0 for one that is not
        stored.
        """

    @abstractmethod
    def codes(self, factor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """The values of a factor as they are stored, each rounded to the nearest, of its shape."""

    def packed(self, codes: Tensor) -> Tensor:
        """Codes as one stored tensor."""
        return codes.contiguous()

    def unpacked(self, ops: StorageOps[V], values: V, count: int) -> V:
        """The codes of a stored tensor."""
        return values

    def packed_beside(self, beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stands beside the values as it is stored."""
        return dict(beside)

    def unpacked_beside(self, ops: StorageOps[V], beside: Mapping[str, V], shape: Shape) -> Mapping[str, V]:
        """What stands beside the values of a factor of that shape, of what is stored."""
        return beside

    def earlier(self, shape: Shape) -> dict[str, Earlier]:
        """The parts, by name, of a factor of that shape that earlier versions stored unlike `parts`."""
        return {}

    @abstractmethod
    def decode(
        self, ops: StorageOps[V], codes: V, beside: Mapping[str, V], shape: Shape, dtype: torch.dtype
    ) -> V:
        """The factor that codes, in its shape or one after another, stand for, in a floating-point type."""

    def store(
        self, factor: Tensor, kept: Tensor | None = None, beside: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The parts of a factor of floating-point numbers, its values rounded to the nearest.

        `kept` says of which entries the values are stored, all others being zero; `beside` are parts to use
        instead of those that suit.
        """
        beside = dict(self.fit(factor) if beside is None else beside)
        codes = self.codes(factor, beside)
        return {VALUES: self.packed(codes if kept is None else codes[kept]), **self.packed_beside(beside)}

    def restore(
        self,
        ops: StorageOps[V],
        parts: Mapping[str, V],
        shape: Shape,
        dtype: torch.dtype,
        kept: V | None = None,
        count: int | None = None,
    ) -> V:
        """The factor that the parts stand for, in a floating-point type.

        `kept` as ones and zeros, `count` of them ones.
        """
        codes = self.unpacked(ops, parts[VALUES], math.prod(shape) if count is None else count)
        stored = {name: part for name, part in parts.items() if name != VALUES}
        beside = self.unpacked_beside(ops, stored, shape)
        return self.decode(
            ops, codes if kept is None else ops.spread(codes, kept, shape), beside, shape, dtype
        )

    def rounded(self, factor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """The numbers, float64, nearest to a factor's of all that can be stored with these parts.

        The parts are those beside the values.
        """
        return self.decode(TorchOps(), self.codes(factor, beside), beside, tuple(factor.shape), torch.float64)

    def column(
        self, numbers: Tensor, beside: Mapping[str, Tensor], shape: Shape, place: int, rows: slice
    ) -> Tensor:
        """`rounded` of one column of the factor of that shape, seen as a matrix.

        Numbers of these rows alone are given.
        """
        return self.rounded(numbers[:, None], beside)[:, 0]

    def beside_lines(
        self, ops: StorageOps[V], beside: Mapping[str, V], shape: Shape, axis: int, places: V
    ) -> Mapping[str, V] | None:
        """What stands beside the values of these slices of a factor along its first or second axis, 0 or 1.

        None where parts do not divide so.
        """
        return beside

    def scales_rows(self, shape: Shape) -> bool:
        """Whether the values are signed bytes that one scale for each row, or for all, makes numbers of."""
        return False

    def bytes(self, shape: Shape) -> int:
        """Bytes of all parts of a factor of that shape."""
        return sum(part.bytes for part in self.parts(shape).values())


NUMBERS: Registry[type[Numbers]] = Registry("number type")


def register_numbers(cls: type[Numbers]) -> type[Numbers]:
    """Class decorator: make a number type known by its `name`."""
    return NUMBERS.add(cls.name, cls)


def numbers_named(text: str) -> Numbers:
    """Read `int8`, `int8/tensor`, `int4/64`, `int8/zero` or `levels16`.

    Raises `PlanError` for what is no number type.
    """
    name, *options = text.split("/")
    stem = name.rstrip("0123456789")
    if name not in NUMBERS and stem not in NUMBERS:
        raise PlanError(f"unknown number type {text!r}; known: {', '.join(NUMBERS.names())}")
    try:
        return (
            NUMBERS.get(name).read(options)
            if name in NUMBERS
            else NUMBERS.get(stem).read([name.removeprefix(stem), *options])
        )
    except ValueError as error:
        raise PlanError(f"number type {text!r} is not understood: {error}") from None
