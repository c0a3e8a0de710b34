"""`level_conv2d`: a convolution whose weight is levels, a table of few numbers and a code for each weight."""

from __future__ import annotations

import math
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
from tdpass.kernels.conv_chain import MAX_TAPS, empty_output, like_input
from tdpass.kernels.flops import conv_macs, of_arguments
from tdpass.kernels.stage import Stage, stages_of
from tdpass.ops import padded_convolution

SCHEMA = (
    "(Tensor x, Tensor codes, Tensor table, Tensor? bias, Tensor? residual, int[] stage, str activation)"
    " -> Tensor"
)
PANEL, FEW, MOST = 16, 16, 256


class Coded(NamedTuple):
    """A weight `[o, i, h, w]` as levels, in panels of 16 outputs.

    `table` are up to 256 numbers.  `codes`, uint8, say which of them: `[ceil(o / 16), h w i, 16]`, or where
    there are no more than 16 numbers two to a byte, rows 2 k (the low half) and 2 k + 1 in row k.  Codes
    beyond the table stand for zero.
    """

    codes: Tensor
    table: Tensor


def pack_levels(codes: Tensor, table: Tensor) -> Coded:
    """Codes `[o, i, ...]` of whole numbers and the levels that they stand for."""
    rows = codes.to(torch.uint8).flatten(2).permute(0, 2, 1).flatten(1)
    panels = F.pad(rows, (0, 0, 0, -len(rows) % PANEL)).reshape(-1, PANEL, rows.shape[1]).mT
    if len(table) <= FEW:
        pairs = F.pad(panels, (0, 0, 0, panels.shape[1] % 2))
        panels = pairs[:, ::2] | (pairs[:, 1::2] << 4)
    return Coded(panels.contiguous(), table.detach().float().contiguous())


def fits(codes: Tensor, table: Tensor, stage: Stage) -> bool:
    """Whether they are what `pack_levels` makes for such a convolution."""
    rows = stage.inputs * stage.kernel[0] * stage.kernel[1]
    if codes.dtype != torch.uint8 or table.dim() != 1 or not 0 < len(table) <= MOST:
        return False
    deep = -(-rows // 2) if len(table) <= FEW else rows
    return tuple(codes.shape) == (-(-stage.outputs // PANEL), deep, PANEL)


def dense(codes: Tensor, table: Tensor, stage: Stage) -> Tensor:
    """The weight `[o, i, h, w]`; raises `KernelError` for parts that are not packed for it."""
    if not fits(codes, table, stage):
        raise KernelError(
            f"codes of shape {tuple(codes.shape)} and a table of shape {tuple(table.shape)} are not those of "
            f"a weight of shape {stage.shape}; use what `pack_levels` returns"
        )
    if len(table) <= FEW:
        codes = torch.stack([codes & (FEW - 1), codes >> 4], 2).flatten(1, 2)
    o, i, h, w = stage.shape
    rows = F.pad(table, (0, MOST - len(table)))[codes[:, : i * h * w].long()].mT.flatten(0, 1)[:o]
    return rows.reshape(o, h * w, i).mT.reshape(o, i, h, w)


def reference(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stage: Sequence[int],
    activation: str,
) -> Tensor:
    """`y = activation(W * x + bias + residual)` with the convolution `stage` and the weight of these levels."""
    (shape,) = stages_of(stage)
    pads = tuple(zip(shape.before, shape.after, strict=True))
    weight = dense(codes, table, shape).to(x.dtype)
    y = padded_convolution(
        x, weight, None if bias is None else bias.to(x.dtype), shape.stride, pads, shape.dilation, 1
    )
    return like_input(activate(y if residual is None else y + residual, activation), x)


def fake(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stage: Sequence[int],
    activation: str,
) -> Tensor:
    """Shape and strides."""
    (shape,) = stages_of(stage)
    if shape.groups != 1:
        raise KernelError(f"level_conv2d takes one group, not {shape.groups}")
    check_activation(activation)
    return empty_output(x, [shape])


LEVEL_CONV2D = register_op(
    Op("level_conv2d", SCHEMA, reference, fake, of_arguments(SCHEMA, conv_macs, "x", "stage"))
)


@implements("level_conv2d", "cpu")
def native_cpu(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stage: Sequence[int],
    activation: str,
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside."""
    (shape,) = stages_of(stage)
    y = empty_output(x, [shape])
    rest = None if residual is None else residual.expand_as(y)
    return y if _run(x, Coded(codes, table), bias, rest, shape, activation, y) else NotImplemented


def _run(
    x: Tensor,
    coded: Coded,
    bias: Tensor | None,
    residual: Tensor | None,
    shape: Stage,
    activation: str,
    y: Tensor,
) -> bool:
    library = native.serving(x, residual)
    if library is None or x.dim() != 4 or x.shape[1] != shape.inputs or not fits(*coded, shape):
        return False
    if shape.groups != 1 or math.prod(shape.kernel) > MAX_TAPS:
        return False
    if bias is not None and bias.shape != (shape.outputs,):
        return False
    rest = None if residual is None else native.image(residual)
    shift = None if bias is None else bias.float().contiguous()
    codes, table = coded.codes.contiguous(), coded.table.float().contiguous()
    call = native.CLevels(
        native.DTYPES[x.dtype],
        len(table),
        native.activation(activation),
        native.stage(shape.integers()),
        codes.data_ptr(),
        table.data_ptr(),
        None if shift is None else shift.data_ptr(),
        None if rest is None else addressof(rest),
    )
    status: int = library.tdpass_level_conv(byref(call), byref(native.image(x)), byref(native.image(y)), None)
    return status == 0
