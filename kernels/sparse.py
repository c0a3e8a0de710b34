"""`sparse_linear` and `sparse_conv2d`: layers of mostly zeros, stored and multiplied without them.

A weight is held as `tdpass.kernels.blocks` packs it.  The product of two thin matrices may stand beside it:
`W = S + U V` is one pass over the input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from ctypes import addressof, byref

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import native
from tdpass.kernels.activation import activate, check_activation
from tdpass.kernels.base import Op, implements, register_op
from tdpass.kernels.blocks import CYCLES, Blocks, fit_thin, unpack_sum
from tdpass.kernels.conv_chain import like_input, memory_format
from tdpass.kernels.flops import of_arguments
from tdpass.kernels.stage import Stage, checked, stages_of
from tdpass.ops import padded_convolution
from tdpass.products import by_rows

_PACKED = "Tensor values, Tensor inputs, Tensor start, Tensor rows"
_END = "str activation, Tensor? v=None, Tensor? u=None) -> Tensor"
CONV_SCHEMA = f"(Tensor x, {_PACKED}, Tensor? bias, Tensor? residual, int[] stage, {_END}"
LINEAR_SCHEMA = f"(Tensor x, {_PACKED}, Tensor? bias, Tensor? residual, int outputs, {_END}"


def conv_reference(
    x: Tensor,
    values: Tensor,
    inputs: Tensor,
    start: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stage: Sequence[int],
    activation: str,
    v: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """`y = activation(W * x + bias + residual)` with the convolution `stage` and the dense weight `S + U V`."""
    (shape,) = stages_of(stage)
    pads = tuple(zip(shape.before, shape.after, strict=True))
    weight = unpack_sum(Blocks(values, inputs, start, rows), v, u, shape.shape).to(x.dtype)
    y = padded_convolution(
        x, weight, None if bias is None else bias.to(x.dtype), shape.stride, pads, shape.dilation, 1
    )
    return like_input(activate(y if residual is None else y + residual, activation), x)


def conv_fake(
    x: Tensor,
    values: Tensor,
    inputs: Tensor,
    start: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stage: Sequence[int],
    activation: str,
    v: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """Shape and strides."""
    (shape,) = stages_of(stage)
    if shape.groups != 1:
        raise KernelError(f"sparse_conv2d takes one group, not {shape.groups}")
    check_activation(activation)
    return _empty_output(x, shape)


def _empty_output(x: Tensor, stage: Stage) -> Tensor:
    size = (x.shape[0], stage.outputs, *stage.output_size(x.shape[2:]))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def linear_reference(
    x: Tensor,
    values: Tensor,
    inputs: Tensor,
    start: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    activation: str,
    v: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """`y = activation(W x + bias + residual)` on the last axis of x, with the dense weight `S + U V`."""
    weight = unpack_sum(Blocks(values, inputs, start, rows), v, u, (outputs, x.shape[-1])).to(x.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return activate(y if residual is None else y + residual, activation)


def linear_fake(
    x: Tensor,
    values: Tensor,
    inputs: Tensor,
    start: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    activation: str,
    v: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """Shape and strides."""
    check_activation(activation)
    return x.new_empty((*x.shape[:-1], outputs))


def _conv_macs(x: Tensor, values: Tensor, stage: Sequence[int], u: Tensor | None) -> int:
    """Multiply-adds: every stored weight once per position."""
    (shape,) = stages_of(stage)
    positions = x.shape[0] * math.prod(map(int, shape.output_size(x.shape[2:])))
    return positions * _weights(values, u, math.prod(shape.shape[1:]) + shape.outputs)


def _linear_macs(x: Tensor, values: Tensor, outputs: int, u: Tensor | None) -> int:
    """Multiply-adds: every stored weight once per row."""
    return by_rows(x.shape, (_weights(values, u, x.shape[-1] + outputs),))


def _weights(values: Tensor, u: Tensor | None, beside: int) -> int:
    """Weights of the blocks, and of V and U, which have so many inputs and outputs, where there are any."""
    return values.numel() + (0 if u is None else u.shape[1] * beside)


SPARSE_CONV2D = register_op(
    Op(
        "sparse_conv2d",
        CONV_SCHEMA,
        conv_reference,
        conv_fake,
        of_arguments(CONV_SCHEMA, _conv_macs, "x", "values", "stage", "u"),
    )
)
SPARSE_LINEAR = register_op(
    Op(
        "sparse_linear",
        LINEAR_SCHEMA,
        linear_reference,
        linear_fake,
        of_arguments(LINEAR_SCHEMA, _linear_macs, "x", "values", "outputs", "u"),
    )
)


@implements("sparse_conv2d", "cpu")
def conv_cpu(
    x: Tensor,
    values: Tensor,
    inputs: Tensor,
    start: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stage: Sequence[int],
    activation: str,
    v: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside."""
    (shape,) = stages_of(stage)
    y = _empty_output(x, shape)
    rest = None if residual is None else residual.expand_as(y)
    return (
        y
        if _run(x, Blocks(values, inputs, start, rows), v, u, bias, rest, tuple(stage), activation, y)
        else NotImplemented
    )


@implements("sparse_linear", "cpu")
def linear_cpu(
    x: Tensor,
    values: Tensor,
    inputs: Tensor,
    start: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    activation: str,
    v: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside."""
    stage = tuple(checked(Stage(x.shape[-1], outputs)).integers())
    y = x.new_empty((*x.shape[:-1], outputs))
    rest = None if residual is None else _positions(residual.expand_as(y))
    blocks, into = Blocks(values, inputs, start, rows), _positions(y)
    return y if _run(_positions(x), blocks, v, u, bias, rest, stage, activation, into) else NotImplemented


def _positions(x: Tensor) -> Tensor:
    """`x[..., c]` as `[1, c, 1, positions]`."""
    return x.contiguous().view(-1, x.shape[-1]).t()[None, :, None, :]


_stage = functools.lru_cache(maxsize=4096)(native.stage)


def _run(
    x: Tensor,
    blocks: Blocks,
    v: Tensor | None,
    u: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stage: tuple[int, ...],
    activation: str,
    y: Tensor,
) -> bool:
    library = native.serving(x, residual)
    if library is None:
        return False
    if x.dim() != 4 or x.shape[1] != stage[0] or (bias is not None and bias.shape != (stage[1],)):
        return False
    if (
        blocks.values.dim() != 2
        or blocks.width not in CYCLES
        or any(part.dim() != 1 or part.dtype != torch.int32 for part in blocks[1:])
    ):
        return False
    if y.numel() == 0:
        return True
    values = blocks.values.float().contiguous()
    inputs, start, rows = (tensor.contiguous() for tensor in blocks[1:])
    segments = (len(start) - 1) // max(blocks.panels, 1)
    if (
        len(inputs) != len(values)
        or len(start) != segments * blocks.panels + 1
        or len(rows) != blocks.panels * blocks.width
        or not fit_thin(v, u, blocks, stage[0] * stage[3] * stage[4])
    ):
        return False
    panels = [each.float().contiguous() for each in (v, u) if each is not None]
    shift = None if bias is None else bias.float().contiguous()
    rest = None if residual is None else native.image(residual)
    call = native.CSparse(
        native.DTYPES[x.dtype],
        blocks.width,
        blocks.panels,
        segments,
        len(values),
        native.activation(activation),
        _stage(stage),
        start.data_ptr(),
        inputs.data_ptr(),
        rows.data_ptr(),
        values.data_ptr(),
        panels[1].shape[1] if panels else 0,
        *([each.data_ptr() for each in panels] or (None, None)),
        None if shift is None else shift.data_ptr(),
        None if rest is None else addressof(rest),
    )
    status: int = library.tdpass_sparse_conv(
        byref(call), byref(native.image(x)), byref(native.image(y)), None
    )
    return status == 0
