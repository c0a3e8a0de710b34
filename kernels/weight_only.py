"""`weight_only_linear`: a linear layer stored in 4, 8, 16 or 32 bits and multiplied in float32.

`W = Q + U V`: a matrix of whole numbers or float8 with a scale per group of inputs, and beside it a product
of two thin matrices for what Q leaves.  With few tokens its time is that of reading the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import native
from tdpass.kernels.activation import activate, check_activation
from tdpass.kernels.base import Op, implements, register_op
from tdpass.kernels.float8_chain import FLOAT8
from tdpass.kernels.flops import of_arguments
from tdpass.products import by_rows

SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor[] scales, Tensor? bias, Tensor? residual, int[] widths, "
    "str activation) -> Tensor"
)
PANEL, NIBBLES = 16, 8  # outputs to a panel; codes of 4 bits to a word
_KINDS: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.uint8: 4,
}
_WITH_ZEROS = 4  # axes of scales
_MATRIX, _WITH_PRODUCT = 2, 3  # widths of `W = Q`, and of `W = Q + U V`


class Stored(NamedTuple):
    """A matrix in panels of 16 outputs, missing ones zero.

    `codes`: int8, float8 (e4m3fn) as uint8, bfloat16 or float32 `[panels, i, 16]`, or four bits each, int32
    `[panels, ceil(i / 8), 16]`: input 8 k + j of word k at bits 4 j, in two's complement.  `scales[panels,
    groups, 16]`: the groups divide the inputs evenly, each a multiple of 8 of them where there are several;
    bfloat16 and float32 have none.  Scales and zero points, `(code - zero) scale`, are `[2, panels, groups,
    16]`.
    """

    codes: Tensor
    scales: Tensor


def pack_codes(codes: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None) -> Stored:
    """Whole numbers `codes[o, i]` of 4 or 8 bits with their scales, and zero points, `[o, groups]`."""
    panels = _panels(codes)
    if bits == 4:
        padded = F.pad(panels.int() & 15, (0, 0, 0, -panels.shape[1] % NIBBLES))
        words = padded.reshape(len(panels), -1, NIBBLES, PANEL)
        shifted = words.long() << (4 * torch.arange(NIBBLES, device=codes.device))[:, None]
        panels = shifted.sum(2).to(torch.int32)
    elif bits == 8:
        panels = panels.to(torch.int8)
    else:
        raise KernelError(f"codes of {bits} bits are not served; they have 4 or 8")
    scales = _panels(scale.float())
    return Stored(
        panels.contiguous(),
        scales.contiguous() if zero is None else torch.stack([scales, _panels(zero.float())]),
    )


def pack_float8(codes: Tensor, scale: Tensor) -> Stored:
    """Numbers `codes[o, i]` of float8, or their bytes, with their scales `[o, groups]`."""
    return Stored(_panels(codes.view(torch.uint8)).contiguous(), _panels(scale.float()).contiguous())


def pack_weight(weight: Tensor, bits: int, group: int = 0) -> Stored:
    """`weight[o, i]` rounded to the nearest of `2^bits - 1` numbers, by groups of inputs (0: a whole row)."""
    size = group or weight.shape[1]
    if weight.shape[1] % size:
        raise KernelError(f"groups of {size} do not divide {weight.shape[1]} inputs; choose another group")
    top = 2 ** (bits - 1) - 1
    rows = weight.detach().double().reshape(len(weight), -1, size)
    largest = rows.abs().amax(2)
    scale = torch.where(largest > 0, largest / top, 1.0).float()
    codes = (rows / scale.double()[..., None]).round().clamp(-top, top).flatten(1)
    return pack_codes(codes.to(torch.int8), scale, bits)


def pack_floats(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Stored:
    """`weight[o, i]` as bfloat16 or float32."""
    panels = _panels(weight.detach().to(dtype)).contiguous()
    return Stored(panels, torch.zeros((len(panels), 0, PANEL)))


def _panels(rows: Tensor) -> Tensor:
    """`rows[o, k]` as `[ceil(o / 16), k, 16]`."""
    return F.pad(rows, (0, 0, 0, -len(rows) % PANEL)).reshape(-1, PANEL, rows.shape[1]).transpose(1, 2)


def dense(stored: Stored, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """The matrix `[outputs, inputs]`; raises `KernelError` where it is none of that shape."""
    codes, scales = stored
    check_stored(codes, scales, outputs, inputs)
    if codes.dtype == torch.int32:
        shifts = 28 - 4 * torch.arange(NIBBLES, dtype=torch.int32, device=codes.device)[:, None]
        codes = ((codes[:, :, None] << shifts) >> 28).flatten(1, 2)[:, :inputs]
    if codes.dtype == torch.uint8:
        codes = codes.view(FLOAT8)
    values, (scale, zero) = codes.to(dtype), split(scales)
    if scale.shape[1]:
        groups = values.reshape(len(values), scale.shape[1], -1, PANEL)
        groups = groups if zero is None else groups - zero.to(dtype)[:, :, None]
        values = (groups * scale.to(dtype)[:, :, None]).flatten(1, 2)
    return values.transpose(1, 2).flatten(0, 1)[:outputs]


def split(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points where there are any, `[panels, groups, 16]` each."""
    return (scales[0], scales[1]) if scales.dim() == _WITH_ZEROS else (scales, None)


def check_stored(codes: Tensor, scales: Tensor, outputs: int, inputs: int) -> None:
    """Raise `KernelError` unless codes and scales are packed for a matrix of that shape."""
    panels = -(-outputs // PANEL)
    depth = -(-inputs // NIBBLES) if codes.dtype == torch.int32 else inputs
    groups = scales.shape[-2] if scales.dim() in (3, _WITH_ZEROS) else -1
    zeros = [2] if scales.dim() == _WITH_ZEROS else []
    floating = codes.is_floating_point()
    known = floating or codes.dtype in (torch.int8, torch.uint8, torch.int32)
    fits = groups == 0 if floating else groups == 1 or (groups > 1 and inputs % (groups * NIBBLES) == 0)
    if (
        min(outputs, inputs) < 1
        or not (known and fits)
        or tuple(codes.shape) != (panels, depth, PANEL)
        or list(scales.shape) != [*zeros, panels, groups, PANEL]
    ):
        raise KernelError(
            f"codes {tuple(codes.shape)} of type {codes.dtype} with scales {tuple(scales.shape)} are no "
            f"matrix of {outputs} x {inputs}; use what `pack_codes`, `pack_float8`, `pack_weight` or "
            "`pack_floats` returns"
        )


def matrices(weights: Sequence[Tensor], widths: Sequence[int]) -> list[tuple[int, int]]:
    """The shapes of Q, V and U; raises `KernelError` where the weights do not fit the widths."""
    if len(widths) not in (_MATRIX, _WITH_PRODUCT) or len(weights) != 2 * len(widths) - 3:
        raise KernelError(
            f"{len(weights)} matrices and widths {list(widths)} do not fit; give Q and [inputs, outputs], "
            "or Q, V, U and [inputs, outputs, rank]"
        )
    inputs, outputs, *rank = widths
    return [(outputs, inputs), *((shape) for r in rank for shape in ((r, inputs), (outputs, r)))]


def _dense(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], widths: Sequence[int], activation: str
) -> list[Tensor]:
    check_activation(activation)
    shapes = matrices(weights, widths)
    if len(scales) != len(weights):
        raise KernelError(f"{len(weights)} matrices have {len(scales)} scales; give one each")
    stored = map(Stored, weights, scales)
    return [dense(each, *shape, x.dtype) for each, shape in zip(stored, shapes, strict=True)]


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """`y = activation(Q x + U (V x) + bias + residual)` on the last axis of x.

    `widths` are inputs and outputs, and the rank where there is a product; `weights` and `scales` those of Q,
    V and U as `Stored` says.
    """
    whole, *thin = _dense(x, weights, scales, widths, activation)
    y = F.linear(x, whole)
    if thin:
        y = y + F.linear(F.linear(x, thin[0]), thin[1])
    if bias is not None:
        y = y + bias.to(y.dtype)
    return activate(y if residual is None else y + residual, activation)


def fake(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """Shape and strides."""
    check_activation(activation)
    matrices(weights, widths)
    return x.new_empty((*x.shape[:-1], widths[1]))


def _macs(x: Tensor, weights: Sequence[Tensor], widths: Sequence[int]) -> int:
    """Multiply-adds."""
    return by_rows(x.shape, *matrices(weights, widths))


WEIGHT_ONLY_LINEAR = register_op(
    Op("weight_only_linear", SCHEMA, reference, fake, of_arguments(SCHEMA, _macs, "x", "weights", "widths"))
)


@implements("weight_only_linear", "cpu")
def native_cpu(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside."""
    shapes = matrices(weights, widths)
    y = x.new_empty((*x.shape[:-1], widths[1]))
    served = len(scales) == len(weights) and x.shape[-1] == widths[0]
    done = served and _run_native(x, weights, scales, bias, residual, shapes, activation, y)
    return y if done else NotImplemented


def _run_native(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    shapes: Sequence[tuple[int, int]],
    activation: str,
    y: Tensor,
) -> bool:
    """Fill y; False where the kernel does not serve these arguments."""
    library = native.serving(x, residual)
    if library is None or any(part.dtype not in _KINDS for part in weights):
        return False
    if any(part.dtype != torch.float32 for part in scales) or (
        bias is not None and bias.shape != y.shape[-1:]
    ):
        return False
    for codes, scale, shape in zip(weights, scales, shapes, strict=True):
        check_stored(codes, scale, *shape)
    if any(split(scale)[1] is not None for scale in scales[1:]):
        return False
    kept = [(codes.contiguous(), scale.contiguous()) for codes, scale in zip(weights, scales, strict=True)]
    array = (native.CMatrix * len(kept))(
        *(
            native.CMatrix(
                codes.data_ptr(),
                scale.data_ptr(),
                _KINDS[codes.dtype],
                scale.shape[-2],
                inputs,
                outputs,
                scale[1].data_ptr() if scale.dim() == _WITH_ZEROS else None,
            )
            for (codes, scale), (outputs, inputs) in zip(kept, shapes, strict=True)
        )
    )
    plain, shift = x.contiguous(), None if bias is None else bias.float().contiguous()
    added = None if residual is None else residual.expand_as(y).contiguous()
    rest = None if added is None else native.rows(added)
    call = native.CWeightOnly(
        native.DTYPES[x.dtype],
        len(kept),
        native.activation(activation),
        addressof(array),
        None if shift is None else shift.data_ptr(),
        None if rest is None else addressof(rest),
    )
    status: int = library.tdpass_weight_only_linear(
        byref(call), byref(native.rows(plain)), byref(native.rows(y)), None
    )
    return status == 0
