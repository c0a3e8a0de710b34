"""Runs the operators whose weights are whole numbers on CUDA through the Triton kernels.

Covered are `linear_chain_int8` and `weight_only_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdpass.kernels import weight_only
from tdpass.kernels.base import implements
from tdpass.kernels.gpu.serving import FLOATS, covered, kernel
from tdpass.kernels.int8_chain import check_chain
from tdpass.kernels.linear_chain import stages_of as linear_stages


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
