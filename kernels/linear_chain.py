"""`linear_chain`: linear layers in a row as one operator, for `svd` and other formats of matrix products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels.activation import activate, check_activation
from tdpass.kernels.base import Op, implements, register_op
from tdpass.kernels.conv_chain import MAX_STAGES, run_native
from tdpass.kernels.flops import linear_macs, of_arguments
from tdpass.kernels.stage import Lanes, Stage, checked, integers_of

SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor? bias, Tensor? residual, int[] widths, str activation) -> Tensor"
)
_PAIR_AXES = 6


def stages_of(widths: Sequence[int]) -> tuple[Stage, ...]:
    """Layers of these widths as 1x1 convolutions.

    Their `pack` for channel lanes or pair lanes is what the operator takes.
    """
    return tuple(checked(Stage(i, o)) for i, o in pairwise(widths))


def lanes_of(weights: Sequence[Tensor]) -> Lanes:
    """What packed weights are packed for: those of pair lanes have an axis more."""
    return "pairs" if weights and weights[0].dim() == _PAIR_AXES else "channels"


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """`y = activation(W_S ... W_1 x + bias + residual)` on the last axis of x."""
    h, lanes = x, lanes_of(weights)
    for stage, packed in zip(stages_of(widths), weights, strict=True):
        h = F.linear(h, stage.unpack(packed, lanes).flatten(1).to(x.dtype))
    if bias is not None:
        h = h + bias.to(h.dtype)
    return activate(h if residual is None else h + residual, activation)


def fake(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """Shape and strides."""
    if not 1 < len(widths) == len(weights) + 1 <= MAX_STAGES + 1:
        raise KernelError(
            f"linear_chain has {len(weights)} weights between {len(widths)} widths; it takes 1 to "
            f"{MAX_STAGES}, each between two widths"
        )
    check_activation(activation)
    return x.new_empty((*x.shape[:-1], widths[-1]))


LINEAR_CHAIN = register_op(
    Op("linear_chain", SCHEMA, reference, fake, of_arguments(SCHEMA, linear_macs, "x", "widths"))
)


@functools.lru_cache(maxsize=4096)
def _integers(widths: tuple[int, ...]) -> tuple[int, ...]:
    """The layers as `run_native` takes them."""
    return tuple(integers_of(stages_of(widths)))


@implements("linear_chain", "cpu")
def native_cpu(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside, or with pair lanes sums alone."""
    y = x.new_empty((*x.shape[:-1], widths[-1]))
    rest = None if residual is None else positions(residual.expand_as(y))
    stages, lanes = _integers(tuple(widths)), lanes_of(weights)
    done = run_native(positions(x), weights, bias, rest, stages, activation, lanes, positions(y))
    return y if done else NotImplemented


def positions(x: Tensor) -> Tensor:
    """`x[..., c]` as `[1, c, 1, positions]`."""
    return x.contiguous().view(-1, x.shape[-1]).t()[None, :, None, :]
