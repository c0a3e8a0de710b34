"""Layers whose products read integers of eight bits.

What they read is rounded at run time, or in ranges found before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpass.form import STATIC, Rank
from tdpass.formats.base import Format
from tdpass.formats.storage import Storage
from tdpass.ops import Pads, TorchOps
from tdpass.site import Site

_LARGEST, _STEPS, _MIDDLE = 127, 255, 128


@dataclass(frozen=True)
class Coded:
    """A factor as the integers that it is stored as: `codes[o, ...]` times `scale[o]`, or one scale for all.

    `reads` holds scale and zero point of the unsigned bytes that it is multiplied with; None where these are
    found anew in every call.
    """

    name: str
    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    reads: Tensor | None = None

    @property
    def plain(self) -> Tensor:
        """The factor as floating-point numbers."""
        along = (-1, *(1 for _ in self.codes.shape[1:]))
        return (self.codes.float() * self.scale.reshape(along)).to(self.dtype)


Value = Tensor | Coded


def coded(storage: Storage, held: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Value]:
    """The factors of what is held: those whose products read integers as such, all others restored."""
    restored: Mapping[str, Tensor] = storage.restore(TorchOps(), held, dtype)
    found: dict[str, Value] = {**restored}
    for name in storage.integer_factors:
        reads = held[storage.range_of(name)] if storage.activations == STATIC else None
        found[name] = Coded(name, held[name], held[storage.scale_of(name)], dtype, reads)
    return found


def apply_integers(
    fmt: Format,
    x: Tensor,
    values: Mapping[str, Value],
    bias: Tensor | None,
    site: Site,
    rank: Rank,
    ops: IntegerOps | None = None,
) -> Tensor:
    """What a layer of such factors answers."""
    verbs: Any = ops or IntegerOps()
    held: Mapping[str, Any] = values
    y: Tensor = fmt.apply(verbs, x, held, bias, site, rank)
    return y


class IntegerOps(TorchOps):
    """`TorchOps` where products with `Coded` factors read integers.

    Without ranges known before, only linear layers do: each row is rounded to signed bytes by its own largest
    number.  With ranges, convolutions compute with the rounded numbers in floating point.  A coded factor
    that meets another verb is a tensor like any.
    """

    def linear(self, x: Value, weight: Value, bias: Value | None) -> Tensor:
        x, bias = _tensor(x), None if bias is None else _tensor(bias)
        if not isinstance(weight, Coded):
            return super().linear(x, weight, bias)
        if not _multiplies_bytes(x):
            return super().linear(rounded(x, weight.reads), weight.plain, bias)
        y = _by_rows(x, weight) if weight.reads is None else _in_range(x, weight, weight.reads)
        return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias

    def conv(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        read, plain = _in_numbers(_tensor(x), weight)
        bias = None if bias is None else _tensor(bias)
        return super().conv(read, plain, bias, stride, padding, dilation, groups)

    def conv_transpose(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        read, plain = _in_numbers(_tensor(x), weight)
        bias = None if bias is None else _tensor(bias)
        return super().conv_transpose(read, plain, bias, stride, cut, dilation, groups)

    def reshape(self, x: Value, shape: Sequence[int]) -> Tensor:
        return super().reshape(_tensor(x), shape)

    def permute(self, x: Value, axes: Sequence[int]) -> Tensor:
        return super().permute(_tensor(x), axes)

    def take(self, x: Value, index: Value, axis: int) -> Tensor:
        return super().take(_tensor(x), _tensor(index), axis)

    def part(self, x: Value, axis: int, start: int, stop: int) -> Tensor:
        return super().part(_tensor(x), axis, start, stop)

    def concat(self, a: Value, b: Value, axis: int) -> Tensor:
        return super().concat(_tensor(a), _tensor(b), axis)

    def matmul(self, a: Value, b: Value) -> Tensor:
        return super().matmul(_tensor(a), _tensor(b))

    def add(self, a: Value, b: Value) -> Tensor:
        return super().add(_tensor(a), _tensor(b))


def rounded(x: Tensor, reads: Tensor | None) -> Tensor:
    """The numbers that the integers stand for, in whose place gradients pass to `x`."""
    if reads is None:
        scale = _scales(x.detach())
        found = _codes(x.detach(), scale) * scale
    else:
        wide = torch.promote_types(x.dtype, torch.float32)  # a step of a half near 255 is too coarse
        reads = reads.to(wide)
        scale, zero = reads[0], reads[1]
        found = (((x.detach() / scale).round() + zero).clamp(0, _STEPS) - zero) * scale
    found = found.to(x.dtype)
    return x + (found - x).detach() if x.requires_grad else found


def _scales(x: Tensor) -> Tensor:
    """What a step of each row stands for; one where the row is zero, NaN where a number of it is."""
    scale = x.float().abs().amax(-1, keepdim=True) / _LARGEST
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).round().clamp(-_LARGEST, _LARGEST)


def _multiplies_bytes(x: Tensor) -> bool:
    """Whether torch's product of bytes serves this input: it has no gradient, and no translation to ONNX."""
    served = x.device.type == "cpu" and not x.requires_grad and x.numel() > 0
    return served and not torch.onnx.is_in_onnx_export()


def _by_rows(x: Tensor, weight: Coded) -> Tensor:
    scale = _scales(x)
    return _product(_codes(x, scale).to(torch.int8), weight.codes) * scale * weight.scale


def _in_range(x: Tensor, weight: Coded, reads: Tensor) -> Tensor:
    """`s t ((q - 128) W + (128 - zero) sum W)` for the unsigned codes q; NaN where a number of the row is."""
    reads = reads.float()  # sums exceed what a half holds
    scale, zero = reads[0], reads[1]
    codes = ((x.float() / scale).round() + zero).clamp(0, _STEPS) - _MIDDLE
    sums = weight.codes.sum(1, dtype=torch.int32)
    whole = _product(codes.to(torch.int8), weight.codes) + (_MIDDLE - zero) * sums
    missing = codes.amax(-1, keepdim=True) * 0  # bytes hold no NaN
    return whole * (scale * weight.scale.float()) + missing


def _product(codes: Tensor, weight: Tensor) -> Tensor:
    if codes.shape[-1] == 1:  # torch takes a single row of int8 for a column, and reads beyond it
        return codes.int() @ weight.int().t()
    flat = codes.reshape(-1, codes.shape[-1]).contiguous()
    whole: Tensor = torch._int_mm(flat, weight.t())  # noqa: SLF001 - torch has no public product of bytes
    return whole.reshape(*codes.shape[:-1], weight.shape[0])


def _in_numbers(x: Tensor, weight: Value) -> tuple[Tensor, Tensor]:
    """What a product in floating point reads, rounded to a coded weight's ranges, and the weight restored."""
    if not isinstance(weight, Coded):
        return x, weight
    return x if weight.reads is None else rounded(x, weight.reads), weight.plain


def _tensor(value: Value) -> Tensor:
    return value.plain if isinstance(value, Coded) else value
