"""The Triton kernels of operators whose weights have few bits, compiled for devices that are not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_setting import compiles, normal
from low_precision import KINDS
from torch import Tensor

from tdpass.kernels import float8_chain
from tdpass.kernels.base import IMPLEMENTATIONS
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_factor import columns, pack_weight
from tdpass.kernels.linear_chain import stages_of
from tdpass.kernels.stage import Stage, integers_of
from tdpass.kernels.weight_only import Stored, pack_floats

pytestmark = pytest.mark.usefixtures("here")


@compiles
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_defaults_compile_for_a_device_that_is_not_here(
    capability: int, compiled_for: Callable[[int], Any]
) -> None:
    found = compiled_for(capability)
    for widths, rows, own in (
        ((768, 160, 64), 512, False),
        ((768, 48, 64), 512, True),
        ((64, 48, 64), 8, False),
        ((64, 40), 8, True),
    ):
        assert IMPLEMENTATIONS["linear_chain_int8", "cuda"](*layers(widths, rows, own)) is not NotImplemented
    for pack, dtype, rows, rank in (
        (KINDS["int4/32"], torch.bfloat16, 1, 40),
        (KINDS["int4"], torch.float16, 512, 0),
        (KINDS["int8"], torch.float32, 8, 140),
        (KINDS["float8/32"], torch.bfloat16, 8, 40),
    ):
        args = weight_only_layer(pack, dtype, rows, rank)
        assert IMPLEMENTATIONS["weight_only_linear", "cuda"](*args) is not NotImplemented
    for stages in ((Stage(64, 32), CORE, Stage(48, 64)), (Stage(3, 32), CORE)):
        for own in (False, True):
            args = image_layers(stages, own)
            assert IMPLEMENTATIONS["conv_chain_int8", "cuda"](*args) is not NotImplemented
    if capability == 90:
        for grid in (0.0, 0.5):
            args = float8_layers(grid)
            assert IMPLEMENTATIONS["linear_chain_float8", "cuda"](*args) is not NotImplemented
    assert found.shared.keys() - {"svd_kernel"} == {
        "pair_kernel",
        "int8_gemm_kernel",
        "conv_int8_kernel",
        "weight_only_kernel",
        "gemm_kernel",
    }
    assert max(found.shared.values()) <= 99 << 10, (
        "a default must fit every device of capability 8.0 and newer"
    )
    for name in ("pair_kernel", "int8_gemm_kernel", "conv_int8_kernel"):
        for text in found.assembly[name]:
            assert "s32.s8.s8" in text, f"{name} does not multiply bytes on tensor cores"
            assert "fma.rn" not in text, (
                f"{name} rounds a product and a sum at once, other than its reference"
            )


def layers(widths: tuple[int, ...], rows: int, own: bool) -> list[Any]:
    """Codes on grids throughout, or bfloat16 with every row on a grid of its own."""
    stages = stages_of(widths)
    factors = columns([pack_weight(stage, normal(*stage.shape)) for stage in stages])
    grids = (
        Grids((Grid(),) * len(stages)) if own else Grids((Grid(1.0, 3),) * len(stages), Grid(1.0), Grid(2.0))
    )
    x, rest = (
        torch.zeros(rows, n, dtype=torch.bfloat16 if own else torch.uint8) for n in (widths[0], widths[-1])
    )
    return [x, *factors, normal(widths[-1]), rest, grids.numbers(), list(widths), "relu"]


def weight_only_layer(
    pack: Callable[[Tensor], Stored], dtype: torch.dtype, rows: int, rank: int
) -> list[Any]:
    """Of 768 inputs and 64 outputs."""
    stored = [pack(normal(64, 768))]
    stored += [pack_floats(normal(rank, 768)), KINDS["int8"](normal(64, rank))] if rank else []
    weights, scales = (list(each) for each in zip(*stored, strict=True))
    x, widths = normal(rows, 768, dtype=dtype), [768, 64, *([rank] if rank else [])]
    return [x, weights, scales, normal(64), None, widths, "silu"]


def float8_layers(grid: float) -> list[Any]:
    """Of 768 inputs, rank 48 and 64 outputs, in bfloat16."""
    packed = [float8_chain.pack_weight(normal(48, 768)), float8_chain.pack_weight(normal(64, 48))]
    weights, scales = (list(each) for each in zip(*packed, strict=True))
    x = normal(512, 768, dtype=torch.bfloat16)
    return [x, weights, scales, normal(64), None, grid, [768, 48, 64], "gelu"]


CORE = Stage(32, 48, 1, (3, 3), (2, 2), (1, 1), (1, 1))


def image_layers(stages: tuple[Stage, ...], own: bool) -> list[Any]:
    """Of bytes on grids, or of bfloat16 where every position has its own, but for the core."""
    factors = columns([pack_weight(stage, normal(*stage.shape)) for stage in stages])
    reads = tuple(Grid() if own and stage.pointwise else Grid(1.0, 3) for stage in stages)
    x = torch.zeros(2, stages[0].inputs, 14, 14, dtype=torch.bfloat16 if own else torch.uint8)
    return [
        x,
        *factors,
        normal(stages[-1].outputs),
        None,
        Grids(reads).numbers(),
        integers_of(stages),
        "relu",
    ]
