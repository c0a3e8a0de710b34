"""The cases that every operator is tested on: one entry in `CASES` per operator, nothing else to add."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from low_precision import (
    cells,
    conv_chain_int8_cases,
    linear_chain_float8_cases,
    linear_chain_int8_cases,
    weight_only_linear_cases,
)
from setting import BOTH, CHAINS, Case, randn
from torch import Tensor

from tdpass.kernels import (
    conv_chain,
    float8_chain,
    int8_chain,
    level_conv,
    linear_chain,
    recurrent,
    recurrent_int8,
    sparse,
    tensor_chain,
    weight_only,
)
from tdpass.kernels.blocks import CYCLES, Blocks, pack, pack_thin
from tdpass.kernels.level_conv import pack_levels
from tdpass.kernels.stage import Lanes, Stage

# What pairs of bfloat16 are summed for is bfloat16 alone.
DTYPES_OF: dict[Lanes, tuple[torch.dtype, ...]] = {
    "channels": BOTH,
    "pixels": BOTH,
    "pairs": (torch.bfloat16,),
}


def conv_chain_cases() -> Iterator[Case]:
    for lanes, dtypes in DTYPES_OF.items():
        for channels, rank, size in ((1, 1, (5, 5)), (3, 2, (9, 16)), (17, 5, (4, 4)), (33, 16, (8, 33))):
            stages = (
                Stage(channels, rank),
                Stage(rank, rank, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
                Stage(rank, channels),
            )
            weights = [stage.pack(randn(*stage.shape), lanes) for stage in stages]
            integers = [value for stage in stages for value in stage.integers()]
            x, name = randn(2, channels, *size), f"{lanes}-{channels}-{rank}"
            yield Case(
                name, (x, weights, randn(channels), torch.randn_like(x), integers, "relu", lanes), dtypes
            )
            yield Case(f"{name}-empty", (x[:0], weights, None, None, integers, "identity", lanes), dtypes)
        for name, stages in CHAINS.items():
            weights = [stage.pack(randn(*stage.shape), lanes) for stage in stages]
            integers = [value for stage in stages for value in stage.integers()]
            x = randn(2, stages[0].inputs, 11, 18)
            for memory_format, activation in (
                (torch.contiguous_format, "identity"),
                (torch.channels_last, "silu"),
            ):
                placed = x.contiguous(memory_format=memory_format)
                residual = torch.randn_like(
                    conv_chain.fake(placed, weights, None, None, integers, "identity", lanes)
                )
                yield Case(
                    f"{lanes}-{name}-{activation}",
                    (placed, weights, randn(stages[-1].outputs), residual, integers, activation, lanes),
                    dtypes,
                )
            y = conv_chain.reference(x, weights, None, None, integers, "identity", lanes)
            x = x * 9 / y.abs().max()  # few are cut off: errors are measured by the largest that is left
            yield Case(f"{lanes}-{name}-relu6", (x, weights, None, None, integers, "relu6", lanes), dtypes)


def linear_chain_cases() -> Iterator[Case]:
    lanes_served: tuple[Lanes, ...] = ("channels", "pairs")
    for lanes in lanes_served:
        for widths in ((3, 1, 17), (33, 16, 1), (64, 8, 64)):
            weights = [stage.pack(randn(*stage.shape), lanes) for stage in linear_chain.stages_of(widths)]
            for tokens in (0, 1, 5, 16, 33):
                x, bias, residual = randn(tokens, widths[0]), randn(widths[-1]), randn(tokens, widths[-1])
                yield Case(
                    f"{lanes}-{widths}-{tokens}",
                    (x, weights, bias, residual, list(widths), "gelu"),
                    DTYPES_OF[lanes],
                )


PROGRAMS = {
    "train-1": tensor_chain.train_program((3,), (5,), ()),
    "train-rank-1": tensor_chain.train_program((3, 1), (17, 2), (1,)),
    "train-3": tensor_chain.train_program((5, 4, 3), (2, 3, 7), (3, 5)),
    "train-4": tensor_chain.train_program((8, 8, 8, 6), (4, 4, 6, 8), (4, 4, 4)),
    "train-wide": tensor_chain.train_program((40, 33), (2, 33), (3,)),
    "ring": tensor_chain.ring_program((6, 5), (4, 11), (2, 3, 4, 5)),
    "ring-rank-1": tensor_chain.ring_program((17, 1), (1, 33), (1, 1, 1, 1)),
    "blocks": tensor_chain.block_program(33, 3, 11, (2, 5, 4)),
    "blocks-rank-1": tensor_chain.block_program(3, 2, 4, (2, 1, 1)),
}


def tensor_chain_cases() -> Iterator[Case]:
    for name, steps in PROGRAMS.items():
        weights = [
            step.pack(randn(step.a if step.batched else 1, step.k, step.o, step.r) / step.k**0.5)
            for step in steps
        ]
        integers = [value for step in steps for value in step.integers()]
        inputs, outputs = steps[0].inputs, steps[-1].outputs
        for tokens, activation in (
            (0, "identity"),
            (1, "relu"),
            (5, "silu"),
            (16, "gelu"),
            (17, "clamp(-1.5,0.75)"),
            (33, "identity"),
        ):
            yield Case(
                f"{name}-{tokens}",
                (
                    randn(tokens, inputs),
                    weights,
                    randn(outputs),
                    randn(tokens, outputs),
                    integers,
                    activation,
                ),
            )
        yield Case(f"{name}-plain", (randn(2, 3, inputs), weights, None, None, integers, "identity"))


def sparse_weight(*shape: int) -> Tensor:
    """Scattered zeros, a removed row every fifth and a removed column every third."""
    weight = torch.randn(shape) * (torch.rand(shape) < 0.4)
    weight[4::5] = 0
    weight[:, 2::3] = 0
    return weight


def thin_beside(blocks: Blocks, stage: Stage, rank: int) -> tuple[Tensor | None, Tensor | None]:
    """A product of that rank beside the blocks; None for rank 0."""
    if not rank:
        return None, None
    v, u = randn(rank, *stage.shape[1:]), randn(stage.outputs, rank)
    return pack_thin(v / v.numel() ** 0.5, u, blocks)


def sparse_linear_cases() -> Iterator[Case]:
    for width in CYCLES:
        for o, i, rank in ((1, 1, 0), (1, 1, 1), (3, 17, 5), (33, 50, 0), (33, 50, 8), (70, 3, 2)):
            blocks, bias = pack(sparse_weight(o, i), width), randn(o)
            thin = thin_beside(blocks, Stage(i, o), rank)
            for tokens, activation in (
                (0, "identity"),
                (1, "relu"),
                (5, "silu"),
                (16, "gelu"),
                (33, "identity"),
                (200, "relu"),
            ):
                yield Case(
                    f"{width}-{o}x{i}-{rank}-{tokens}",
                    (randn(tokens, i), *blocks, bias, randn(tokens, o), o, activation, *thin),
                )
        yield Case(
            f"{width}-zero",
            (randn(2, 3, 4), *pack(torch.zeros(5, 4), width), None, None, 5, "identity", None, None),
        )


SPARSE_STAGES = {
    "1x1": Stage(17, 33),
    "1x1-s2": Stage(3, 16, 1, (1, 1), (2, 2)),
    "3x3": Stage(3, 33, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3-s2": Stage(17, 20, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x2-uneven": Stage(5, 7, 1, (3, 2), (2, 3), (2, 0), (1, 1), (1, 2)),
    "one": Stage(1, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), (2, 2)),
}


def sparse_conv2d_cases() -> Iterator[Case]:
    for width in CYCLES:
        for rank, (name, stage) in enumerate(SPARSE_STAGES.items()):
            blocks, bias = pack(sparse_weight(*stage.shape), width), randn(stage.outputs)
            for memory_format, activation in (
                (torch.contiguous_format, "relu"),
                (torch.channels_last, "silu"),
            ):
                x = randn(2, stage.inputs, 9, 21).contiguous(memory_format=memory_format)
                y = torch.empty((2, stage.outputs, *stage.output_size((9, 21))), memory_format=memory_format)
                end = (stage.integers(), activation, *thin_beside(blocks, stage, 3 * rank))
                yield Case(f"{width}-{name}-{activation}", (x, *blocks, bias, torch.randn_like(y), *end))
            end = (stage.integers(), "identity", None, None)
            yield Case(f"{width}-{name}-empty", (x[:0], *blocks, None, None, *end))
    wide = Stage(
        64, 16, 1, (3, 3), (1, 1), (1, 1), (1, 1)
    )  # rows are cut where a band of whole rows would not fit the cache
    for rank in (0, 17):
        blocks = pack(sparse_weight(*wide.shape), 8)
        end = (wide.integers(), "identity", *thin_beside(blocks, wide, rank))
        yield Case(f"bands-{rank}", (randn(1, 64, 4, 700), *blocks, None, None, *end))


def level_conv2d_cases() -> Iterator[Case]:
    for name, stage in {**SPARSE_STAGES, "wide": Stage(160, 40, 1, (3, 3), (1, 1), (1, 1), (1, 1))}.items():
        for levels in (1, 5, 16, 17, 200):
            packed = pack_levels(torch.randint(levels, stage.shape), randn(levels) / 3)
            for memory_format, activation in (
                (torch.contiguous_format, "relu"),
                (torch.channels_last, "silu"),
            ):
                x = randn(2, stage.inputs, 9, 21).contiguous(memory_format=memory_format)
                y = torch.empty((2, stage.outputs, *stage.output_size((9, 21))), memory_format=memory_format)
                end = (randn(stage.outputs), torch.randn_like(y), stage.integers(), activation)
                yield Case(f"{name}-{levels}-{activation}", (x, *packed, *end))
            yield Case(f"{name}-{levels}-empty", (x[:0], *packed, None, None, stage.integers(), "identity"))


def _cells(gates: int) -> Iterator[tuple[str, tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor]]]:
    for steps, batch, hidden, rank in (
        (1, 1, 1, 1),
        (5, 1, 17, 3),
        (4, 3, 33, 17),
        (3, 7, 16, 1),
        (2, 0, 8, 4),
        (6, 2, 64, 33),
    ):
        v, u = randn(rank, hidden) / hidden**0.5, randn(gates * hidden, rank) / rank**0.5
        pre, bias = randn(steps, batch, gates * hidden), randn(gates * hidden)
        states = (randn(batch, hidden), randn(batch, hidden))
        for dtype in BOTH:
            packed = (pre, recurrent.pack_v(v, dtype), recurrent.pack_u(u, gates, dtype))
            yield f"{steps}-{batch}-{hidden}-{rank}-{dtype}", packed, bias, states


def low_rank_lstm_cases() -> Iterator[Case]:
    for name, packed, bias, (h, c) in _cells(4):
        yield Case(name, (*packed, None, h, c, False), (torch.float32,))
        yield Case(f"{name}-reverse", (*packed, bias, h, c, True), (torch.float32,))


def low_rank_gru_cases() -> Iterator[Case]:
    for name, packed, bias, (h, _) in _cells(3):
        yield Case(name, (*packed, None, h, False), (torch.float32,))
        yield Case(f"{name}-reverse", (*packed, bias, h, True), (torch.float32,))


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    conv_chain.CONV_CHAIN.name: conv_chain_cases,
    int8_chain.CONV_CHAIN_INT8.name: conv_chain_int8_cases,
    float8_chain.LINEAR_CHAIN_FLOAT8.name: linear_chain_float8_cases,
    int8_chain.LINEAR_CHAIN_INT8.name: linear_chain_int8_cases,
    linear_chain.LINEAR_CHAIN.name: linear_chain_cases,
    recurrent.LOW_RANK_GRU.name: low_rank_gru_cases,
    recurrent.LOW_RANK_LSTM.name: low_rank_lstm_cases,
    recurrent_int8.LOW_RANK_GRU_INT8.name: lambda: cells(3),
    recurrent_int8.LOW_RANK_LSTM_INT8.name: lambda: cells(4),
    level_conv.LEVEL_CONV2D.name: level_conv2d_cases,
    sparse.SPARSE_CONV2D.name: sparse_conv2d_cases,
    sparse.SPARSE_LINEAR.name: sparse_linear_cases,
    tensor_chain.TENSOR_CHAIN.name: tensor_chain_cases,
    weight_only.WEIGHT_ONLY_LINEAR.name: weight_only_linear_cases,
}


def cases_of(name: str) -> list[Case]:
    """The cases of an operator, the same on every call."""
    torch.manual_seed(0)
    return list(CASES[name]())
