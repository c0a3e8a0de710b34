"""Runs the operators whose weights have few bits on CUDA through the Triton kernels.

Covered are `conv_chain_int8` of the stages that `conv_chain` has here, `linear_chain_int8`,
`weight_only_linear`, and `linear_chain_float8` of two layers, on devices of compute capability 8.9 or newer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdpass.kernels import float8_chain, weight_only
from tdpass.kernels.base import implements
from tdpass.kernels.gpu.operators import core_place
from tdpass.kernels.gpu.serving import FLOATS, covered, kept, kernel, spaced
from tdpass.kernels.int8_chain import check_chain
from tdpass.kernels.linear_chain import stages_of as linear_stages
from tdpass.kernels.stage import stages_of


@implements("conv_chain_int8", "cuda")
@covered(*FLOATS, torch.uint8)
def conv_chain_int8(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Sequence[float],
    stages: Sequence[int],
    activation: str,
) -> Any:
    """`tucker2` and what has a stage less, the core on a grid that is given."""
    chain, factors = stages_of(stages), (weights, scales, totals)
    place = core_place(chain)
    if place is None or x.dim() != 4:
        return NotImplemented
    found = check_chain(x, factors, residual, grids, chain, activation)
    packed = list(zip(chain, *factors, strict=True))
    return kernel("conv_chain_int8")(x, packed, place, bias, residual, found, activation)


@implements("linear_chain_int8", "cuda")
@covered(*FLOATS, torch.uint8)
def linear_chain_int8(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Sequence[float],
    widths: Sequence[int],
    activation: str,
) -> Any:
    """Any number of layers, two of them in one launch."""
    chain, factors = linear_stages(widths), (weights, scales, totals)
    found = check_chain(x, factors, residual, grids, chain, activation)
    packed = list(zip(chain, *factors, strict=True))
    return kernel("linear_chain_int8")(x, packed, bias, residual, found, activation)


@implements("weight_only_linear", "cuda")
@covered(*FLOATS)
def weight_only_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    widths: Sequence[int],
    activation: str,
) -> Any:
    """All that the operator takes."""
    shapes = weight_only.matrices(weights, widths)
    return kernel("weight_only_linear")(x, weights, scales, shapes, bias, residual, activation)


@implements("linear_chain_float8", "cuda")
@covered(*FLOATS)
def linear_chain_float8(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grid: float,
    widths: Sequence[int],
    activation: str,
) -> Any:
    """Two layers; what lies between is in the type of x, or in bfloat16 where x is on a grid."""
    float8_chain.check_chain(weights, scales, grid, widths, activation)
    if len(weights) != 2:
        return NotImplemented
    read = float8_chain.on_grid(x.float(), grid) if grid else x
    how = kernel("svd_linear", "Scales")(grid or 1.0, *scales)
    v, u = (_float8_rows(weight) for weight in weights)
    return kernel("svd_linear")(read, v, u, bias, residual, activation, scales=how, dtype=x.dtype)


def _float8_rows(weight: Tensor) -> Tensor:
    return kept(weight, ("float8",), lambda: spaced(weight.view(float8_chain.FLOAT8), float8_chain.FLOAT8))
