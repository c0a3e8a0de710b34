"""`linear_chain_float8`: linear layers in a row, matrices in floats of eight bits (e4m3), a scale per output.

Where the input has a grid it is rounded to float8 too, so that the first product is one of eight bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels.activation import activate, check_activation
from tdpass.kernels.base import Op, register_op
from tdpass.kernels.conv_chain import MAX_STAGES
from tdpass.kernels.flops import linear_macs, of_arguments

SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor[] scales, Tensor? bias, Tensor? residual, float grid, int[] widths, "
    "str activation) -> Tensor"
)
FLOAT8 = torch.float8_e4m3fn
TOP = torch.finfo(FLOAT8).max


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight[o, i]` as bytes of float8, and a float32 scale per row, by which its largest is float8's."""
    rows = weight.detach().double()
    largest = rows.abs().amax(1)
    scale = torch.where(largest > 0, largest / TOP, 1.0).float()
    return (rows / scale.double()[:, None]).clamp(-TOP, TOP).to(FLOAT8).view(torch.uint8), scale


def on_grid(x: Tensor, grid: float) -> Tensor:
    """`x` as float8 in steps of `grid`; what is beyond its range is cut."""
    return (x / grid).clamp(-TOP, TOP).to(FLOAT8)


def check_chain(
    weights: Sequence[Tensor], scales: Sequence[Tensor], grid: float, widths: Sequence[int], activation: str
) -> None:
    """Raise `KernelError` for arguments that are no chain."""
    check_activation(activation)
    if not (1 < len(widths) == len(weights) + 1 == len(scales) + 1 <= MAX_STAGES + 1):
        raise KernelError(
            f"linear_chain_float8 has {len(weights)} weights and {len(scales)} scales between {len(widths)} "
            f"widths; it takes 1 to {MAX_STAGES} of each, between two widths"
        )
    if not 0 <= grid < math.inf:
        raise KernelError(
            f"{grid} is no scale of the input; it is positive, or 0 for an input that is not rounded"
        )
    for weight, scale, (i, o) in zip(weights, scales, pairwise(widths), strict=True):
        if weight.dtype != torch.uint8 or tuple(weight.shape) != (o, i) or tuple(scale.shape) != (o,):
            raise KernelError(
                f"a layer from {i} to {o} channels takes bytes of float8 [{o}, {i}] and scales [{o}], not "
                f"{weight.dtype} {tuple(weight.shape)} and {tuple(scale.shape)}"
            )


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grid: float,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """`y = activation(W_S ... W_1 x + bias + residual)` on the last axis of x, `W[o, i] = w[o, i] scale[o]`.

    `weights` and `scales` as `pack_weight` makes them; products are made in the type of x.  With `grid`
    over 0, x is rounded to float8 in steps of it.
    """
    check_chain(weights, scales, grid, widths, activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    h = (on_grid(x.to(wide), grid).to(wide) * grid).to(x.dtype) if grid else x
    for weight, scale in zip(weights, scales, strict=True):
        h = F.linear(h, (weight.view(FLOAT8).to(wide) * scale.to(wide)[:, None]).to(x.dtype))
    if bias is not None:
        h = h + bias.to(h.dtype)
    return activate(h if residual is None else h + residual, activation)


def fake(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grid: float,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """Shape and strides."""
    check_chain(weights, scales, grid, widths, activation)
    return x.new_empty((*x.shape[:-1], widths[-1]))


LINEAR_CHAIN_FLOAT8 = register_op(
    Op("linear_chain_float8", SCHEMA, reference, fake, of_arguments(SCHEMA, linear_macs, "x", "widths"))
)
