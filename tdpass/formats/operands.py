"""Operands: factors without what they hold twice, as the products of a layer take them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from tdpass.formats.geometry import unit
from tdpass.ops import Ops, Pads, V

Product = Callable[..., Any]


class Operand(ABC):
    """A factor whose products pass on what meets an identity, and multiply the rest.

    `product(x, weight, bias, groups)` multiplies by a weight; `axis` is that of channels, counted from the
    last.
    """

    @abstractmethod
    def times(self, ops: Any, x: Any, bias: Any, axis: int, product: Product) -> Any:
        """The product of the factor with x, and a bias on it."""


@dataclass(frozen=True)
class Part(Operand):
    """A factor of `width` rows (columns) of which `r` are those of an identity, and `rest` the others.

    `sides` is the shape that `rest` has as a matrix, where it is stored as none.
    """

    rest: Any
    order: Any
    writes: bool
    r: int
    width: int
    sides: tuple[int, int] | None = None

    def times(self, ops: Any, x: Any, bias: Any, axis: int, product: Product) -> Any:
        rest = self.rest if self.sides is None else ops.reshape(self.rest, self.sides)
        if self.writes:
            return self._written(ops, x, rest, bias, axis, product)
        first, others = self._read(ops, x, axis)
        return ops.add(first, product(others, rest, bias))

    def _written(self, ops: Any, h: Any, rest: Any, bias: Any, axis: int, product: Product) -> Any:
        """`P [h; C h] + b`."""
        if self.order is None and bias is not None:
            first = ops.add(h, _along(ops, ops.part(bias, -1, 0, self.r), self.r, axis))
            return ops.concat(first, product(h, rest, ops.part(bias, -1, self.r, self.width)), axis)
        y = ops.concat(h, product(h, rest, None), axis)
        if self.order is not None:
            y = ops.take(y, self.order, axis)
        return y if bias is None else ops.add(y, _along(ops, bias, self.width, axis))

    def _read(self, ops: Any, x: Any, axis: int) -> tuple[Any, Any]:
        """`x_p, x_rest`."""
        ends = ((0, self.r), (self.r, self.width))
        if self.order is None:
            first, rest = (ops.part(x, axis, *pair) for pair in ends)
        else:
            first, rest = (ops.take(x, ops.part(self.order, -1, *pair), axis) for pair in ends)
        return first, rest


@dataclass(frozen=True)
class Sliced(Operand):
    """A core that makes r times a mode of `slices`, the first of which is `first` and `rest` the others."""

    first: Part
    rest: Any
    slices: int

    def times(self, ops: Any, x: Any, bias: Any, axis: int, product: Product) -> Any:
        r, others = self.first.r, self.slices - 1
        made = ops.reshape(self.first.times(ops, x, None, axis, product), (-1, r, 1))
        rest = product(x, ops.reshape(self.rest, (r * others, self.first.width)), None)
        whole = ops.concat(made, ops.reshape(rest, (-1, r, others)), -1)
        return ops.reshape(whole, (-1, r * self.slices))


@dataclass(frozen=True)
class Tapped(Operand):
    """A convolution some of whose outputs read features of their own.

    `pivots` outputs each read `taps` features of their own, by `own`; the others read all, by `rest`.
    """

    own: Any
    rest: Any
    order: Any
    pivots: int
    taps: int
    width: int

    def times(self, ops: Any, x: Any, bias: Any, axis: int, product: Product) -> Any:
        alone = ops.part(x, axis, 0, self.pivots * self.taps)
        split = self.order is None and bias is not None
        ends = ((0, self.pivots), (self.pivots, self.width))
        shifts = [ops.part(bias, -1, *pair) for pair in ends] if split else [None, None]
        y = ops.concat(
            product(alone, self.own, shifts[0], self.pivots), product(x, self.rest, shifts[1]), axis
        )
        if self.order is not None:
            y = ops.take(y, self.order, axis)
        return y if split or bias is None else ops.add(y, _along(ops, bias, self.width, axis))


def _along(ops: Any, values: Any, count: int, axis: int) -> Any:
    """Values per channel, to be added to what has its channels there."""
    return ops.reshape(values, (count, *unit(-1 - axis)))


class Sparing(Generic[V]):
    """Products with such factors; all else is left to `ops`."""

    def __init__(self, ops: Ops[V]) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """As it is where it is such a factor, which knows its own shape."""
        return x if isinstance(x, Operand) else self.ops.reshape(x, shape)

    def linear(self, x: V, weight: Any, bias: V | None) -> Any:
        """Of a matrix `[o, i]`."""
        if isinstance(weight, Operand):
            return weight.times(self.ops, x, bias, -1, self.ops.linear)
        return self.ops.linear(x, weight, bias)

    def matmul(self, a: V, b: Any) -> Any:
        """Of a matrix `[i, o]`."""
        if isinstance(b, Operand):
            return b.times(self.ops, a, None, -1, lambda x, weight, bias: self.ops.matmul(x, weight))
        return self.ops.matmul(a, b)

    def conv(
        self,
        x: V,
        weight: Any,
        bias: V | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Any:
        """Of a convolution."""
        return self._moved(self.ops.conv, x, weight, bias, stride, padding, dilation, groups)

    def conv_transpose(
        self,
        x: V,
        weight: Any,
        bias: V | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Any:
        """Of a transposed convolution."""
        return self._moved(self.ops.conv_transpose, x, weight, bias, stride, cut, dilation, groups)

    def _moved(self, move: Any, x: V, weight: Any, bias: V | None, stride: Sequence[int], *rest: Any) -> Any:
        *window, groups = rest

        def product(read: V, kernel: V, shift: V | None, apart: int = 1) -> Any:
            return move(read, kernel, shift, stride, *window, groups * apart)

        if isinstance(weight, Operand):
            return weight.times(self.ops, x, bias, -1 - len(stride), product)
        return product(x, weight, bias)
