"""Cases of the operators whose weights are whole numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from setting import CHAINS, Case, randn
from torch import Tensor

from tdpass.kernels import float8_chain, recurrent_int8, weight_only
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_factor import columns, pack_weight
from tdpass.kernels.linear_chain import stages_of
from tdpass.kernels.stage import Stage, integers_of
from tdpass.kernels.weight_only import Stored
from tdpass.numbers import numbers_named
from tdpass.ops import padded_convolution

# State that falls on the other side of half a step is off by one step, 1 / 127 of its range.
ONE_STEP = 1.5e-2
BOTTLENECKS = {
    f"{channels}-{rank}": (
        Stage(channels, rank),
        Stage(rank, rank, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
        Stage(rank, channels),
    )
    for channels, rank in ((1, 1), (3, 2), (17, 5), (70, 33))
}
STEMS = {
    "few": (Stage(3, 20, 1, (7, 7), (2, 2), (3, 3), (3, 3)),),
    "more": (Stage(6, 17, 1, (3, 3), (1, 1), (0, 1), (1, 0)), Stage(17, 5)),
    "apart": (Stage(4, 16, 1, (3, 3), (1, 2), (2, 2), (2, 2), (2, 2)),),
}
Scaled = Callable[..., Tensor]


def scaled(*shape: int) -> Tensor:
    """Weights that keep the size of what they multiply."""
    return randn(*shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5


def bytes_of(x: Tensor, grid: Grid) -> Tensor:
    return grid.codes(x).to(torch.uint8)


def grid_over(x: Tensor, zero: int) -> Grid:
    """A grid that cuts off a little of the numbers."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return Grid(0.9 * (largest or 1.0) / max(zero, 255 - zero), zero)


def chain(
    x: Tensor, stages: Sequence[Stage], zeros: Sequence[int]
) -> tuple[tuple[list[Tensor], list[Tensor], list[Tensor]], list[Grid], Tensor]:
    """Factors, the grids that stages read, and the result in floating point."""
    weights = [scaled(*stage.shape) for stage in stages]
    grids = []
    for stage, weight, zero in zip(stages, weights, itertools.cycle(zeros)):
        grids.append(grid_over(x, zero))
        pads = tuple(zip(stage.before, stage.after, strict=True))
        x = padded_convolution(x, weight, None, stage.stride, pads, stage.dilation, stage.groups)
    return columns([pack_weight(*each) for each in zip(stages, weights, strict=True)]), grids, x


def conv_chain_int8_cases() -> Iterator[Case]:
    for name, stages in {**BOTTLENECKS, **STEMS, **CHAINS}.items():
        x = randn(2, stages[0].inputs, 11, 18)
        factors, reads, y = chain(x, stages, (128, 100, 0, 255))
        integers, bias, residual = integers_of(stages), randn(stages[-1].outputs), torch.randn_like(y)
        plain, output, added = Grids(tuple(reads)), grid_over(y, 90), grid_over(residual, 7)
        on_grids = Grids(tuple(reads), output, added)
        yield Case(f"{name}-plain", (x, *factors, bias, None, plain.numbers(), integers, "relu"))
        coded, large = bytes_of(x, reads[0]), 8 * bias  # beyond 6 and below 0
        for kind, grids in (("plain", plain), ("out", Grids(tuple(reads), output))):
            yield Case(
                f"{name}-relu6-{kind}", (coded, *factors, large, None, grids.numbers(), integers, "relu6")
            )
        for memory_format, activation in (
            (torch.contiguous_format, "silu"),
            (torch.channels_last, "gelu"),
        ):
            placed = x.contiguous(memory_format=memory_format)
            end = (bias, residual.contiguous(memory_format=memory_format), plain.numbers())
            yield Case(f"{name}-{activation}", (placed, *factors, *end, integers, activation))
            rest = bytes_of(residual, added).contiguous(memory_format=memory_format)
            end = (bias, rest, on_grids.numbers())
            yield Case(
                f"{name}-{activation}-bytes", (bytes_of(placed, reads[0]), *factors, *end, integers, "relu")
            )
            yield Case(f"{name}-{activation}-out", (placed, *factors, *end, integers, "identity"))
        empty = (x[:0], *factors, None, None, plain.numbers(), integers, "identity")
        yield Case(f"{name}-empty", empty)


def linear_chain_int8_cases() -> Iterator[Case]:
    for widths in ((3, 1, 17), (33, 16, 1), (70, 9, 64, 5), (20, 40)):
        stages = stages_of(widths)
        for tokens in (0, 1, 5, 33, 70):
            x, bias, residual = randn(tokens, widths[0]), randn(widths[-1]), randn(tokens, widths[-1])
            factors, reads, y = chain(x[:, :, None, None], stages, (128, 3, 200))
            own = Grids((Grid(),) * len(stages))
            mixed = Grids((reads[0], *own.reads[1:]), grid_over(y, 128))
            later = Grids((Grid(), *reads[1:]))
            name = f"{widths}-{tokens}"
            for kind, grids, rest, activation in (
                ("own", own, residual, "gelu"),
                ("static", Grids(tuple(reads)), None, "identity"),
                ("mixed", mixed, None, "relu"),
                ("later", later, residual, "silu"),
            ):
                yield Case(
                    f"{name}-{kind}", (x, *factors, bias, rest, grids.numbers(), list(widths), activation)
                )


def around_a_zero_point(weight: Tensor, bits: int, group: int) -> Stored:
    """Whole numbers that cover the range of each group from end to end."""
    numbers = numbers_named(f"int{bits}/{group}/zero")
    beside = numbers.fit(weight)
    grids = [beside[name].reshape(len(weight), -1) for name in ("scale", "zero")]
    return weight_only.pack_codes(numbers.codes(weight, beside), grids[0], bits, grids[1])


def in_float8(weight: Tensor, group: int) -> Stored:
    """Float8 with a scale for each group, or for a whole row."""
    rows = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale = rows.abs().amax(2).clamp_min(1e-9) / float8_chain.TOP
    return weight_only.pack_float8((rows / scale[..., None]).to(float8_chain.FLOAT8).flatten(1), scale)


KINDS: dict[str, Callable[[Tensor], Stored]] = {
    "int4": lambda weight: weight_only.pack_weight(weight, 4),
    "int4/32": lambda weight: weight_only.pack_weight(weight, 4, 32),
    "int8": lambda weight: weight_only.pack_weight(weight, 8),
    "int8/16": lambda weight: weight_only.pack_weight(weight, 8, 16),
    "int4/32/zero": lambda weight: around_a_zero_point(weight, 4, 32),
    "int8/16/zero": lambda weight: around_a_zero_point(weight, 8, 16),
    "float8": lambda weight: in_float8(weight, 0),
    "float8/32": lambda weight: in_float8(weight, 32),
    "bfloat16": weight_only.pack_floats,
    "float32": lambda weight: weight_only.pack_floats(weight, torch.float32),
}


def weight_only_linear_cases() -> Iterator[Case]:
    for kind, pack in KINDS.items():
        for inputs, outputs in (
            ((32, 3), (64, 17), (160, 40)) if "/" in kind else ((1, 1), (13, 17), (70, 40))
        ):
            for tokens, rank, activation in (
                (0, 3, "relu"),
                (1, 0, "identity"),
                (3, 5, "silu"),
                (9, 17, "gelu"),
                (5, 0, "clamp(-0.5,2.0)"),
            ):
                stored = [pack(scaled(outputs, inputs))]
                if rank:
                    stored.append(weight_only.pack_floats(scaled(rank, inputs)))
                    stored.append(weight_only.pack_weight(scaled(outputs, rank), 8))
                weights, scales = (list(each) for each in zip(*stored, strict=True))
                end = (randn(outputs), randn(tokens, outputs), [inputs, outputs, *([rank] if rank else [])])
                name = f"{kind}-{outputs}x{inputs}-{tokens}-{rank}"
                yield Case(name, (randn(tokens, inputs), weights, scales, *end, activation))


def linear_chain_float8_cases() -> Iterator[Case]:
    for widths in ((3, 1, 17), (33, 16, 1), (70, 9, 64, 5), (20, 40)):
        packed = [float8_chain.pack_weight(scaled(o, i)) for i, o in itertools.pairwise(widths)]
        weights, scales = (list(each) for each in zip(*packed, strict=True))
        for tokens, activation in ((0, "identity"), (1, "relu"), (5, "silu"), (33, "gelu")):
            x, residual = randn(tokens, widths[0]), randn(tokens, widths[-1])
            for grid in (0.0, 2.0**-7):  # a power of two: no number falls on another side of half a step
                end = (randn(widths[-1]), residual, grid, list(widths), activation)
                yield Case(f"{widths}-{tokens}{'-rounded' if grid else ''}", (x, weights, scales, *end))


def cells(gates: int) -> Iterator[Case]:
    for steps, batch, hidden, rank in (
        (1, 1, 1, 1),
        (5, 1, 17, 3),
        (4, 3, 33, 17),
        (2, 0, 8, 4),
        (6, 2, 64, 33),
    ):
        v, u = scaled(rank, hidden), scaled(gates * hidden, rank)
        packed = (*recurrent_int8.pack_v(v), *recurrent_int8.pack_u(u, gates))
        states = [randn(batch, hidden) for _ in range(2 if gates == 4 else 1)]
        for reverse, bias in ((False, None), (True, randn(gates * hidden))):
            args = (randn(steps, batch, gates * hidden), *packed, bias, *states, reverse)
            name = f"{steps}-{batch}-{hidden}-{rank}{'-reverse' * reverse}"
            yield Case(name, args, (torch.float32,), ONE_STEP)
