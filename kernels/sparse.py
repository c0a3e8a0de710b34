"""`sparse_linear` and `sparse_conv2d`: layers of mostly zeros, stored and multiplied without them.

A weight is held as `tdpass.kernels.blocks` packs it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import addressof, byref

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import native
from tdpass.kernels.activation import activate, check_activation
from tdpass.kernels.base import Op, implements, register_op
from tdpass.kernels.blocks import CYCLES, Blocks, unpack
from tdpass.kernels.conv_chain import like_input, memory_format
from tdpass.kernels.stage import Stage, checked, stages_of
from tdpass.ops import padded_convolution
from tdpass.products import by_rows

_PACKED = "Tensor values, Tensor inputs, Tensor start, Tensor rows"
CONV_SCHEMA = f"(Tensor x, {_PACKED}, Tensor? bias, Tensor? residual, int[] stage, str activation) -> Tensor"
LINEAR_SCHEMA = (
    f"(Tensor x, {_PACKED}, Tensor? bias, Tensor? residual, int outputs, str activation) -> Tensor"
)


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
) -> Tensor:
    """`y = activation(W * x + bias + residual)` with the convolution `stage` and the dense weight W."""
    (shape,) = stages_of(stage)
    pads = tuple(zip(shape.before, shape.after, strict=True))
    weight = unpack(Blocks(values, inputs, start, rows), shape.shape).to(x.dtype)
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
) -> Tensor:
    """`y = activation(W x + bias + residual)` on the last axis of x, with the dense weight W."""
    weight = unpack(Blocks(values, inputs, start, rows), (outputs, x.shape[-1])).to(x.dtype)
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
) -> Tensor:
    """Shape and strides."""
    check_activation(activation)
    return x.new_empty((*x.shape[:-1], outputs))


def _conv_macs(y: Tensor, x: Tensor, values: Tensor, *_: object) -> int:
    """Multiply-adds: every stored weight once per position."""
    return values.numel() * (y.numel() // y.shape[1])


def _linear_macs(y: Tensor, x: Tensor, values: Tensor, *_: object) -> int:
    """Multiply-adds: every stored weight once per row."""
    return by_rows(x.shape, values.shape)


SPARSE_CONV2D = register_op(Op("sparse_conv2d", CONV_SCHEMA, conv_reference, conv_fake, _conv_macs))
SPARSE_LINEAR = register_op(Op("sparse_linear", LINEAR_SCHEMA, linear_reference, linear_fake, _linear_macs))


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
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside."""
    (shape,) = stages_of(stage)
    y = _empty_output(x, shape)
    rest = None if residual is None else residual.expand_as(y)
    return (
        y
        if _run(x, Blocks(values, inputs, start, rows), bias, rest, tuple(stage), activation, y)
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
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside."""
    stage = tuple(checked(Stage(x.shape[-1], outputs)).integers())
    y = x.new_empty((*x.shape[:-1], outputs))
    rest = None if residual is None else _positions(residual.expand_as(y))
    return (
        y
        if _run(
            _positions(x), Blocks(values, inputs, start, rows), bias, rest, stage, activation, _positions(y)
        )
        else NotImplemented
    )


def _positions(x: Tensor) -> Tensor:
    """`x[..., c]` as `[1, c, 1, positions]`."""
    return x.contiguous().view(-1, x.shape[-1]).t()[None, :, None, :]


_stage = functools.lru_cache(maxsize=4096)(native.stage)


def _run(
    x: Tensor,
    blocks: Blocks,
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
    ):
        return False
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
        None if shift is None else shift.data_ptr(),
        None if rest is None else addressof(rest),
    )
    status: int = library.tdpass_sparse_conv(
        byref(call), byref(native.image(x)), byref(native.image(y)), None
    )
    return status == 0
