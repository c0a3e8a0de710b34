"""Factors of int8 chains: whole numbers packed for the kernels, with a scale per output channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels.stage import Stage

MOST_PRODUCTS = 2**16  # per output: what surely fits 32 bits, each being up to 255 x 128


class Int8Factor(NamedTuple):
    """The weight of a stage: `weight[o, ...] scale[o]`, packed for quad lanes.

    `total[o]` is the sum of its whole numbers.
    """

    weight: Tensor
    scale: Tensor
    total: Tensor


def pack_codes(stage: Stage, codes: Tensor, scale: Tensor) -> Int8Factor:
    """Whole numbers `codes[o, i / groups, h, w]`, -128 to 127, with their scales `[o]` or `[1]`."""
    return Int8Factor(
        stage.pack(codes, "quads"),
        scale.float().expand(stage.outputs).contiguous(),
        codes.reshape(stage.outputs, -1).sum(1, dtype=torch.int32),
    )


def pack_weight(stage: Stage, weight: Tensor) -> Int8Factor:
    """`weight[o, i / groups, h, w]` rounded to 127 steps on either side of zero, by output channel."""
    rows = weight.detach().double().reshape(stage.outputs, -1)
    largest = rows.abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, 1.0).float()
    codes = (rows / scale.double()[:, None]).round().clamp(-127, 127)
    return pack_codes(stage, codes.to(torch.int8).reshape(weight.shape), scale)


def columns(factors: Sequence[Int8Factor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The weights, scales and totals of a chain, each a list, as its operator takes them."""
    return tuple(map(list, zip(*factors, strict=True)))  # type: ignore[return-value]


def check_factors(
    stages: Sequence[Stage], weights: Sequence[Tensor], scales: Sequence[Tensor], totals: Sequence[Tensor]
) -> None:
    """Raise `KernelError` unless these are the packed factors of the stages."""
    if not len(stages) == len(weights) == len(scales) == len(totals):
        raise KernelError(
            f"a chain of {len(stages)} stages has {len(weights)} weights, {len(scales)} scales and "
            f"{len(totals)} totals; it takes one of each per stage, as `pack_weight` makes them"
        )
    for stage, weight, scale, total in zip(stages, weights, scales, totals, strict=True):
        wanted = stage.packed_shape("quads")
        if tuple(weight.shape) != wanted or any(
            tuple(part.shape) != (stage.outputs,) for part in (scale, total)
        ):
            raise KernelError(
                f"a stage takes a weight packed as {wanted} and {stage.outputs} scales and totals, not "
                f"{tuple(weight.shape)}, {tuple(scale.shape)} and {tuple(total.shape)}"
            )
        if math.prod(stage.shape[1:]) > MOST_PRODUCTS:
            raise KernelError(
                f"{math.prod(stage.shape[1:])} products per output of {stage} may exceed 32 bits; "
                f"a stage has at most {MOST_PRODUCTS}"
            )
