"""The few verbs a factored layer may use, so that one `apply` serves torch and ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tdpass.bits import unpack_bits

V = TypeVar("V")
Pads = Sequence[tuple[int, int]]


class Ops(Protocol[V]):
    """Operations on values of one front end: torch runs them, ONNX records them.

    Sizes are passed explicitly: a value's own shape is never read, because in a recorded graph it may be
    unknown.
    """

    def linear(self, x: V, weight: V, bias: V | None) -> V:
        """`y[..., o] = sum_i weight[o, i] x[..., i] + bias[o]`."""

    def conv(
        self,
        x: V,
        weight: V,
        bias: V | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> V:
        """Convolution of `x[n, i, *size]` with `weight[o, i / groups, *kernel]`.

        `padding` is (before, after) per axis.
        """

    def conv_transpose(
        self,
        x: V,
        weight: V,
        bias: V | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> V:
        """`y[n, o, stride p + dilation k - before] += weight[o, i, k] x[n, i, p]`.

        Here `weight` is `[o, i / groups, *kernel]`. `cut` is (before, after) per axis: how many positions of
        the whole sum are left out; where `after` is negative, so many more are made, fewer than the larger of
        stride and dilation.
        """

    def reshape(self, x: V, shape: Sequence[int]) -> V:
        """Reshape; -1 stands for the one size that follows from the rest."""

    def permute(self, x: V, axes: Sequence[int]) -> V:
        """Reorder axes."""

    def take(self, x: V, index: V, axis: int) -> V:
        """The slices of `x` along an axis, counted from the last, that whole numbers `index[k]` name."""

    def part(self, x: V, axis: int, start: int, stop: int) -> V:
        """The slices `start` to `stop` along an axis, counted from the last."""

    def concat(self, a: V, b: V, axis: int) -> V:
        """`a`, then `b` along an axis, counted from the last."""

    def matmul(self, a: V, b: V) -> V:
        """Batched matrix product over the last two axes."""

    def add(self, a: V, b: V) -> V:
        """Broadcast sum."""

    def flatten_positions(self, x: V, last: int) -> V:
        """`x[..., last]` to `[positions, last]`."""

    def restore_positions(self, y: V, like: V, last: int) -> V:
        """`y[positions, last]` to the leading axes of `like`, then `last`."""

    def fill(self, like: V, bias: V, windows: Sequence[tuple[int, int]]) -> V:
        """`bias[o]` at every output position of a layer that reads `like`, or as what broadcasts to that.

        `windows` holds (reach, stride) per spatial axis, output size = (size - reach) // stride + 1; none for
        a linear layer.
        """


class AxisOps(Ops[V], Protocol[V]):
    """`Ops`, and several axes seen as one."""

    def join(self, x: V, count: int) -> V:
        """The last `count` axes as one."""

    def split(self, x: V, sizes: Sequence[int]) -> V:
        """The last axis as several of these sizes."""


class StorageOps(Ops[V], Protocol[V]):
    """`Ops`, and what makes factors of the parts that they are stored as."""

    def cast(self, x: V, dtype: torch.dtype) -> V:
        """The same numbers in another floating-point type."""

    def quantize(self, x: V, scale: V, zero: V) -> V:
        """`x / scale + zero`, rounded (halves to even), within the range of the integer type of `zero`."""

    def dequantize(
        self, values: V, scale: V, zero: V | None, shape: Sequence[int], rows: int, dtype: torch.dtype
    ) -> V:
        """`(values[r, k] - zero[r]) scale[r]` in single precision, as a tensor of that shape and type.

        `values` are integers of that shape, or one after another, seen as so many rows.
        """

    def unpack(self, packed: V, count: int, bits: int, *, signed: bool = False) -> V:
        """The first `count` integers of what `pack_bits` packed, one after another.

        With `signed` in two's complement.
        """

    def spread(self, values: V, kept: V, shape: Sequence[int]) -> V:
        """A tensor of that shape with `values`, in order, where `kept` is one, and zero elsewhere.

        `kept` has ones and zeros, one after another.
        """

    def places(self, kept: V, count: int) -> V:
        """Where the `count` ones are among ones and zeros, in order."""

    def order(self, kept: V) -> V:
        """The place among the ones of each of ones and zeros; of a zero that of some one."""

    def where(self, kept: V, x: V, other: V | None) -> V:
        """`x` where `kept` is one, and `other`, or zero, elsewhere; all broadcast."""

    def tiled(self, cells: V, tile: tuple[int, int], shape: tuple[int, int]) -> V:
        """What is said of a matrix's tiles, row by row, for each of its entries, one after another."""

    def lookup(self, table: V, indices: V) -> V:
        """`table[indices]`, along the table's first axis."""


def padded_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution with zero padding (before, after) per axis, as one recorded call on unpadded input."""
    if has_torch_function((x, weight)):
        result: Tensor = handle_torch_function(
            padded_convolution, (x, weight), x, weight, bias, stride, padding, dilation, groups
        )
        return result
    x = F.pad(x, [size for pair in reversed(padding) for size in pair])
    return (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](
        x, weight, bias, tuple(stride), 0, tuple(dilation), groups
    )


def own_bias(y: Tensor, bias: Tensor, axes: int) -> Tensor:
    """`y[..., o, *positions] + bias[o]`.

    The bias of one of several layers that share a weight, over `axes` axes of positions.
    """
    return y + bias.to(y.dtype).reshape(-1, *(1 for _ in range(axes)))


def transposed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer with its weight as `[i, o]`, recorded as one call that reads it as it is stored."""
    return F.linear(x, weight.t(), bias)


def swapped_channels(weight: Tensor, groups: int) -> Tensor:
    """`[o, i / groups, *kernel]` of `[i, o / groups, *kernel]`, as transposed convolutions are, and back."""
    first, second, *kernel = weight.shape
    parts = weight.reshape(groups, first // groups, second, *kernel).transpose(1, 2)
    return parts.reshape(groups * second, first // groups, *kernel)


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    cut: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`Ops.conv_transpose`, recorded as one call."""
    if has_torch_function((x, weight)):
        result: Tensor = handle_torch_function(
            transposed_convolution, (x, weight), x, weight, bias, stride, cut, dilation, groups
        )
        return result
    whole = [(before, before - after) for before, after in cut]
    limits = [max(steps) for steps in zip(stride, dilation, strict=True)]
    if not all(
        0 <= extra < limit for (_, extra), limit in zip(whole, limits, strict=True)
    ):  # torch cuts both ends alike
        whole = [(min(before, after), 0) if after >= 0 else (0, -after) for before, after in cut]
    padding, extra = zip(*whole, strict=True)
    stored = swapped_channels(weight, groups)
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    y = convolve(x, stored, bias, tuple(stride), padding, extra, groups, tuple(dilation))
    rest = [(before - p, after - p + e) for (before, after), p, e in zip(cut, padding, extra, strict=True)]
    return F.pad(y, [-size for pair in reversed(rest) for size in pair]) if any(map(any, rest)) else y


class TorchOps:
    """Eager torch; also the reference of every kernel."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        if any(before != after for before, after in padding):
            return padded_convolution(x, weight, bias, stride, padding, dilation, groups)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return convolve(
            x, weight, bias, tuple(stride), tuple(before for before, _ in padding), tuple(dilation), groups
        )

    def conv_transpose(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        return transposed_convolution(x, weight, bias, stride, cut, dilation, groups)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(tuple(shape))

    def permute(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(tuple(axes))

    def take(self, x: Tensor, index: Tensor, axis: int) -> Tensor:
        return x.index_select(axis, index)

    def part(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        return x.narrow(axis, start, stop - start)

    def concat(self, a: Tensor, b: Tensor, axis: int) -> Tensor:
        return torch.cat((a, b), axis)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        held = torch.iinfo(zero.dtype)
        return ((x.float() / scale).round() + zero.float()).clamp(held.min, held.max).to(zero.dtype)

    def dequantize(
        self,
        values: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        shape: Sequence[int],
        rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        numbers = values.float().reshape(rows, -1)  # ONNX Runtime reshapes no float8
        if zero is not None:
            numbers = numbers - zero.float()[:, None]
        return (numbers * scale.float()[:, None]).reshape(tuple(shape)).to(dtype)

    def unpack(self, packed: Tensor, count: int, bits: int, *, signed: bool = False) -> Tensor:
        return unpack_bits(packed, count, bits, signed=signed)

    def spread(self, values: Tensor, kept: Tensor, shape: Sequence[int]) -> Tensor:
        found = values.reshape(-1)[self.order(kept)] if values.numel() else values.new_zeros(kept.shape)
        return self.where(kept, found, None).reshape(tuple(shape))

    def places(self, kept: Tensor, count: int) -> Tensor:
        size = kept.shape[0]  # a stable sort, which no exporter knows, of what is kept before what is not
        return torch.topk(
            size * kept - torch.arange(size, dtype=kept.dtype, device=kept.device), count
        ).indices

    def order(self, kept: Tensor) -> Tensor:
        return (kept.cumsum(0) - 1).clamp_min(0)

    def where(self, kept: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
        return torch.where(kept > 0, x, x.new_zeros(()) if other is None else other.to(x.dtype))

    def tiled(self, cells: Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
        (high, wide), (rows, columns) = tile, shape
        return cells.reshape(rows // high, 1, columns // wide, 1).expand(-1, high, -1, wide).reshape(-1)

    def lookup(self, table: Tensor, indices: Tensor) -> Tensor:
        if table.dim() == 2:  # as torch's own tables are read, so that a run shows it to be one
            return F.embedding(indices, table)
        return table.index_select(0, indices.flatten()).reshape(*indices.shape, *table.shape[1:])

    def join(self, x: Tensor, count: int) -> Tensor:
        return x.flatten(-count)

    def split(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return x.reshape((*x.shape[:-1], *sizes))

    def flatten_positions(self, x: Tensor, last: int) -> Tensor:
        return x.reshape(-1, last)

    def restore_positions(self, y: Tensor, like: Tensor, last: int) -> Tensor:
        return y.reshape((*like.shape[:-1], last))

    def fill(self, like: Tensor, bias: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
        if not windows:
            return bias.expand((*like.shape[:-1], bias.shape[0])).clone()
        samples, spatial = like.shape[: -len(windows) - 1], like.shape[-len(windows) :]
        sizes = [(size - reach) // stride + 1 for size, (reach, stride) in zip(spatial, windows, strict=True)]
        return bias.reshape(-1, *(1 for _ in sizes)).expand(*samples, -1, *sizes).clone()
