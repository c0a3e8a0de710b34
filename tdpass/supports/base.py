"""What a support is: tiles of a factor, some of them stored, and one bit per tile that says whether it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.bits import pack_bits
from tdpass.errors import PlanError
from tdpass.ops import StorageOps, V
from tdpass.registry import Registry

Shape = tuple[int, ...]
SUPPORT = "support"
PERCENT = 100


def matrix_of(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a factor: its first axis, and all others together."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Support(ABC):
    """One kind of support with its sizes; a frozen dataclass per file, registered with `register_support`.

    Class attributes: `name`, `example`, a text that `read` takes, `group`, what is zero at once where a
    machine is asked from which share of zeros on that pays, and `opset`, the version of ONNX's operators from
    which on it is read.  A factor is seen as a matrix
    (`matrix_of`), divided into tiles; what is kept of it is stored in order of rows, and of columns within a
    row.
    """

    name: ClassVar[str]
    example: ClassVar[str]
    group: ClassVar[str] = "weight"
    opset: ClassVar[int] = 11

    @classmethod
    @abstractmethod
    def read(cls, text: str) -> Self | None:
        """From its text; None where that is another support's."""

    @abstractmethod
    def tile(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of a tile; raises `PlanError` for a shape that it does not divide."""

    @abstractmethod
    def tiles(self, shape: Shape) -> int:
        """How many tiles of a factor of that shape are kept."""

    @abstractmethod
    def choose(self, scores: Tensor) -> Tensor:
        """Which entries of a factor are kept, as booleans of its shape.

        They are those whose tiles have the largest sums of `scores`.
        """

    @property
    def share(self) -> float | None:
        """The share of every factor that is kept, where it is said as such and depends on no shape."""
        return None

    def kept(self, shape: Shape) -> int:
        """How many entries of a factor of that shape are stored."""
        return self.tiles(shape) * math.prod(self.tile(shape))

    def sparsity(self, shape: Shape) -> float:
        """The share of a factor of that shape that is zero."""
        return 1 - self.kept(shape) / math.prod(shape)

    def bits(self, shape: Shape) -> int:
        """One for each tile."""
        return math.prod(shape) // math.prod(self.tile(shape))

    def lines(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of the matrix that are left where whole ones go; all of them elsewhere."""
        (rows, columns), (high, wide) = matrix_of(shape), self.tile(shape)
        if wide == columns:
            return high * self.tiles(shape), columns
        return rows, wide * self.tiles(shape) if high == rows else columns

    def line(self, shape: Shape) -> int | None:
        """The axis of the factor, 0 or 1, along which single slices are kept whole.

        None where tiles are no such slices, or do not divide the factor.
        """
        rows, columns = matrix_of(shape)
        along = {(rows, math.prod(shape[2:])): 1, (1, columns): 0}
        try:
            return along.get(self.tile(shape))
        except PlanError:
            return None

    def bits_of(self, ops: StorageOps[V], packed: V, shape: Shape) -> V:
        """Ones for tiles that are kept and zeros for others, one after another."""
        return ops.unpack(packed, self.bits(shape), 1)

    def packed(self, kept: Tensor) -> Tensor:
        """The bits of what `choose` chose for a factor, in bytes."""
        rows, columns = matrix_of(tuple(kept.shape))
        high, wide = self.tile(tuple(kept.shape))
        tiles = kept.reshape(rows // high, high, columns // wide, wide)[:, 0, :, 0]
        return pack_bits(tiles, 1)

    def mask(self, ops: StorageOps[V], packed: V, shape: Shape) -> V:
        """Ones where entries are kept and zeros elsewhere, one after another."""
        tile = self.tile(shape)
        bits = self.bits_of(ops, packed, shape)
        return bits if tile == (1, 1) else ops.tiled(bits, tile, matrix_of(shape))


SUPPORTS: Registry[type[Support]] = Registry("support")


def register_support(cls: type[Support]) -> type[Support]:
    """Class decorator: make a support known by its `name`."""
    return SUPPORTS.add(cls.name, cls)


def support_named(text: str) -> Support:
    """Read `2:4`, `blocks4x4/12`, `rows/8`, `columns/30%` or `unstructured/500`.

    Raises `PlanError` for what is no support.
    """
    for cls in SUPPORTS:
        found = cls.read(text)
        if found is not None:
            return found
    raise PlanError(
        f"support {text!r} is not understood; write one of {', '.join(cls.example for cls in SUPPORTS)}"
    )


def amount_of(text: str, whole: int) -> int:
    """How many of `whole` a count or a share such as `30%` is, one at least."""
    if not text.endswith("%"):
        return int(text)
    return max(1, min(whole, round(float(text[:-1]) / PERCENT * whole)))


def largest(sums: Tensor, count: int) -> Tensor:
    """Booleans of the `count` largest values; of equal ones the first."""
    order = torch.sort(sums.reshape(-1), descending=True, stable=True).indices[:count]
    chosen = torch.zeros(sums.numel(), dtype=torch.bool, device=sums.device)
    chosen[order] = True
    return chosen.reshape(sums.shape)
