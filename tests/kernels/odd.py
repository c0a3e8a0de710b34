"""Cases at random: odd sizes, steps, paddings and layouts; and layers that only apply an activation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from random import Random

import torch
from cases import DTYPES_OF, thin_beside
from low_precision import KINDS, ONE_STEP, bytes_of, chain, grid_over
from low_precision import scaled as _scaled
from setting import BOTH, ENDINGS, Case, randn
from torch import Tensor

from tdpass.kernels import (
    conv_chain,
    float8_chain,
    level_conv,
    linear_chain,
    recurrent,
    recurrent_int8,
    sparse,
    tensor_chain,
)
from tdpass.kernels.blocks import CYCLES, pack
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.level_conv import pack_levels
from tdpass.kernels.stage import Lanes, Stage, integers_of

WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _stage(chance: Random, inputs: int, outputs: int, size: list[int], *, groups: bool = True) -> Stage:
    """A convolution that fits an image of that size, which becomes that of its output."""
    both = [g for g in (1, 1, 2, 3, inputs) if inputs % g == 0 and outputs % g == 0]
    pairs = [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1]]
    for axis in range(2):
        kernel, stride, dilation = (
            chance.choice((1, 2, 3, 5)),
            chance.choice((1, 1, 2, 3)),
            chance.choice((1, 1, 2)),
        )
        before, after = chance.randint(0, 3), chance.randint(0, 3)
        room = size[axis] + before + after - (kernel - 1) * dilation - 1
        if room >= 0:
            pairs[axis] = [kernel, stride, before, after, dilation]
            size[axis] = room // stride + 1
    (kh, sh, bh, ah, dh), (kw, sw, bw, aw, dw) = pairs
    return Stage(
        inputs,
        outputs,
        chance.choice(both) if groups else 1,
        (kh, kw),
        (sh, sw),
        (bh, bw),
        (ah, aw),
        (dh, dw),
    )


def conv_chain_case(chance: Random) -> Case:
    lanes: Lanes = chance.choice(list(DTYPES_OF))
    widths = [chance.choice(WIDTHS) for _ in range(chance.randint(2, 5))]
    batch, size = chance.randint(1, 3), [chance.randint(1, 12), chance.randint(1, 40)]
    x = randn(batch, widths[0], *size).contiguous(memory_format=chance.choice(_LAYOUTS))
    stages = [_stage(chance, i, o, size) for i, o in itertools.pairwise(widths)]
    weights = [stage.pack(_scaled(*stage.shape), lanes) for stage in stages]
    integers = [value for stage in stages for value in stage.integers()]
    y = conv_chain.fake(x, weights, None, None, integers, "identity", lanes)
    bias = chance.choice((None, randn(widths[-1])))
    residual = chance.choice((None, torch.randn_like(y)))  # type: ignore[type-var]
    activation = chance.choice(ENDINGS)
    dtypes = DTYPES_OF[lanes]
    if lanes == "pixels" and any(
        stage.stride[1] not in (1, 2, 4) for stage in stages
    ):  # what pixel lanes do not serve
        return conv_chain_case(chance)
    return Case(
        f"{lanes} {tuple(x.shape)} {x.stride()} {stages} {activation}",
        (x, weights, bias, residual, integers, activation, lanes),
        dtypes,
    )


def linear_chain_case(chance: Random) -> Case:
    lanes: Lanes = chance.choice(("channels", "pairs"))
    widths = [chance.choice(WIDTHS) for _ in range(chance.randint(2, 6))]
    weights = [stage.pack(_scaled(*stage.shape), lanes) for stage in linear_chain.stages_of(widths)]
    shape = tuple(chance.randint(1, 20) for _ in range(chance.randint(0, 2)))
    bias, residual = (
        chance.choice((None, randn(widths[-1]))),
        chance.choice((None, randn(*shape, widths[-1]))),
    )
    activation = chance.choice(ENDINGS)
    return Case(
        f"{lanes} {shape} {widths} {activation}",
        (randn(*shape, widths[0]), weights, bias, residual, widths, activation),
        DTYPES_OF[lanes],
    )


def tensor_chain_case(chance: Random) -> Case:
    small = (1, 2, 3, 4, 5, 7, 8, 9)
    count = chance.randint(1, 4)
    outs, ins = ([chance.choice(small) for _ in range(count)] for _ in range(2))
    programs = (
        tensor_chain.train_program(outs, ins, [chance.choice(small) for _ in range(count - 1)]),
        tensor_chain.ring_program((ins[0], 3), (outs[0], 5), tuple(chance.choice(small) for _ in range(4))),
        tensor_chain.block_program(7 * outs[0], ins[0], 3, tuple(chance.choice(small) for _ in range(3))),
    )
    steps = chance.choice(programs)
    weights = [
        step.pack(randn(step.a if step.batched else 1, step.k, step.o, step.r) / step.k**0.5)
        for step in steps
    ]
    integers = [value for step in steps for value in step.integers()]
    shape, outputs = tuple(chance.randint(1, 9) for _ in range(chance.randint(0, 2))), steps[-1].outputs
    bias, residual = chance.choice((None, randn(outputs))), chance.choice((None, randn(*shape, outputs)))
    activation = chance.choice(ENDINGS)
    return Case(
        f"{shape} {steps} {activation}",
        (randn(*shape, steps[0].inputs), weights, bias, residual, integers, activation),
    )


def _sparse(chance: Random, *shape: int) -> Tensor:
    weight = _scaled(*shape) * (torch.rand(shape) < chance.choice((0.05, 0.4, 0.9)))
    weight[torch.rand(shape[0]) < chance.choice((0.0, 0.3, 0.7))] = 0
    return weight


def sparse_linear_case(chance: Random) -> Case:
    width, o, i = chance.choice(list(CYCLES)), chance.choice(WIDTHS), chance.choice(WIDTHS)
    shape = tuple(chance.randint(1, 20) for _ in range(chance.randint(0, 2)))
    blocks = pack(_sparse(chance, o, i), width)
    bias, residual = chance.choice((None, randn(o))), chance.choice((None, randn(*shape, o)))
    thin, activation = thin_beside(blocks, Stage(i, o), chance.choice((0, *WIDTHS))), chance.choice(ENDINGS)
    return Case(
        f"{width} {shape} {o}x{i} {activation} {thin[0] is None}",
        (randn(*shape, i), *blocks, bias, residual, o, activation, *thin),
    )


def sparse_conv2d_case(chance: Random) -> Case:
    width, o, i = chance.choice(list(CYCLES)), chance.choice(WIDTHS), chance.choice(WIDTHS)
    size = [chance.randint(1, 12), chance.randint(1, 40)]
    x = randn(chance.randint(1, 2), i, *size).contiguous(memory_format=chance.choice(_LAYOUTS))
    stage = _stage(chance, i, o, size, groups=False)
    blocks = pack(_sparse(chance, *stage.shape), width)
    y = sparse.conv_fake(x, *blocks, None, None, stage.integers(), "identity")
    bias, residual = chance.choice((None, randn(o))), chance.choice((None, torch.randn_like(y)))
    thin, activation = thin_beside(blocks, stage, chance.choice((0, *WIDTHS))), chance.choice(ENDINGS)
    return Case(
        f"{width} {tuple(x.shape)} {x.stride()} {stage} {activation} {thin[0] is None}",
        (x, *blocks, bias, residual, stage.integers(), activation, *thin),
    )


def level_conv2d_case(chance: Random) -> Case:
    o, i, levels = chance.choice(WIDTHS), chance.choice(WIDTHS), chance.choice((1, 2, 15, 16, 17, 256))
    size = [chance.randint(1, 12), chance.randint(1, 40)]
    x = randn(chance.randint(1, 2), i, *size).contiguous(memory_format=chance.choice(_LAYOUTS))
    stage = _stage(chance, i, o, size, groups=False)
    packed = pack_levels(torch.randint(levels, stage.shape), randn(levels))
    y = level_conv.fake(x, *packed, None, None, stage.integers(), "identity")
    bias, residual = chance.choice((None, randn(o))), chance.choice((None, torch.randn_like(y)))
    activation = chance.choice(ENDINGS)
    return Case(
        f"{levels} {tuple(x.shape)} {x.stride()} {stage} {activation}",
        (x, *packed, bias, residual, stage.integers(), activation),
    )


def _cell_case(chance: Random, gates: int) -> Case:
    steps, batch, hidden, rank = (
        chance.randint(1, 5),
        chance.randint(1, 9),
        chance.choice(WIDTHS),
        chance.choice(WIDTHS),
    )
    v, u = _scaled(rank, hidden), _scaled(gates * hidden, rank)
    states = [randn(batch, hidden) for _ in range(gates - 2)][: 2 if gates == 4 else 1]
    bias = chance.choice((None, randn(gates * hidden)))
    packed = (randn(steps, batch, gates * hidden), recurrent.pack_v(v), recurrent.pack_u(u, gates))
    return Case(
        f"{steps}-{batch}-{hidden}-{rank}", (*packed, bias, *states, chance.random() < 0.5), (torch.float32,)
    )


def conv_chain_int8_case(chance: Random) -> Case:
    widths = [chance.choice(WIDTHS) for _ in range(chance.randint(2, 5))]
    size = [chance.randint(1, 12), chance.randint(1, 40)]
    memory_format = chance.choice(_LAYOUTS)
    x = randn(chance.randint(1, 3), widths[0], *size)
    stages = [_stage(chance, i, o, size) for i, o in itertools.pairwise(widths)]
    factors, reads, y = chain(x, stages, [chance.randint(0, 255) for _ in stages])
    if chance.random() < 0.3:
        reads = [Grid() if stage.pointwise else grid for stage, grid in zip(stages, reads, strict=True)]
    residual: Tensor | None = torch.randn_like(y)
    output, added = chance.choice((Grid(), grid_over(y, 77))), chance.choice((Grid(), grid_over(y, 200)))
    if chance.random() < 0.3:
        residual, added = None, Grid()
    if residual is not None:
        residual = (bytes_of(residual, added) if added else residual).contiguous(memory_format=memory_format)
    if reads[0] and chance.random() < 0.3:
        x = bytes_of(x, reads[0])
    activation = chance.choice(("identity", "relu", ENDINGS[-1]) if output else ENDINGS)
    numbers = Grids(tuple(reads), output, added).numbers()
    end = (chance.choice((None, randn(widths[-1]))), residual, numbers, integers_of(stages), activation)
    name = f"{tuple(x.shape)} {memory_format} {stages} {numbers} {activation}"
    dtypes = (torch.float32,) if x.dtype == torch.uint8 else BOTH
    return Case(name, (x.contiguous(memory_format=memory_format), *factors, *end), dtypes)


def linear_chain_int8_case(chance: Random) -> Case:
    widths = [chance.choice((*WIDTHS, 64, 65, 130)) for _ in range(chance.randint(2, 6))]
    shape = tuple(chance.randint(1, 20) for _ in range(chance.randint(0, 2)))
    x, stages = randn(*shape, widths[0]), linear_chain.stages_of(widths)
    flat = x.reshape(-1, widths[0])[:, :, None, None]
    factors, reads, y = chain(flat, stages, [chance.randint(0, 255) for _ in stages])
    reads = [chance.choice((Grid(), grid)) for grid in reads]
    output = chance.choice((Grid(), grid_over(y, 77)))
    activation = chance.choice(("identity", "relu", ENDINGS[-1]) if output else ENDINGS)
    bias = chance.choice((None, randn(widths[-1])))
    residual = chance.choice((None, randn(*shape, widths[-1])))
    end = (bias, residual, Grids(tuple(reads), output).numbers(), widths, activation)
    return Case(f"{shape} {widths} {reads} {activation}", (x, *factors, *end))


def linear_chain_float8_case(chance: Random) -> Case:
    widths = [chance.choice(WIDTHS) for _ in range(chance.randint(2, 5))]
    shape = tuple(chance.randint(1, 20) for _ in range(chance.randint(0, 2)))
    packed = [float8_chain.pack_weight(_scaled(o, i)) for i, o in itertools.pairwise(widths)]
    weights, scales = (list(each) for each in zip(*packed, strict=True))
    bias = chance.choice((None, randn(widths[-1])))
    residual = chance.choice((None, randn(*shape, widths[-1])))
    activation, grid = chance.choice(ENDINGS), chance.choice((0.0, 2.0**-7))
    end = (bias, residual, grid, widths, activation)
    return Case(f"{shape} {widths} {grid} {activation}", (randn(*shape, widths[0]), weights, scales, *end))


def weight_only_linear_case(chance: Random) -> Case:
    kind = chance.choice(list(KINDS))
    inputs = 32 * chance.randint(1, 5) if "/" in kind else chance.choice(WIDTHS)
    outputs, rank = chance.choice(WIDTHS), chance.choice((0, *WIDTHS))
    shape = tuple(chance.randint(1, 20) for _ in range(chance.randint(0, 2)))
    single = [pack for name, pack in KINDS.items() if "/" not in name]
    stored = [KINDS[kind](_scaled(outputs, inputs))]
    if rank:
        stored += [chance.choice(single)(_scaled(*size)) for size in ((rank, inputs), (outputs, rank))]
    weights, scales = (list(each) for each in zip(*stored, strict=True))
    bias = chance.choice((None, randn(outputs)))
    residual = chance.choice((None, randn(*shape, outputs)))
    activation = chance.choice(ENDINGS)
    end = (bias, residual, [inputs, outputs, *([rank] if rank else [])], activation)
    return Case(f"{kind} {shape} {end[2]} {activation}", (randn(*shape, inputs), weights, scales, *end))


def _cell_int8_case(chance: Random, gates: int) -> Case:
    steps, batch = chance.randint(1, 5), chance.randint(1, 9)
    hidden, rank = chance.choice(WIDTHS), chance.choice(WIDTHS)
    v, u = _scaled(rank, hidden), _scaled(gates * hidden, rank)
    states = [randn(batch, hidden) for _ in range(2 if gates == 4 else 1)]
    packed = (*recurrent_int8.pack_v(v), *recurrent_int8.pack_u(u, gates))
    bias = chance.choice((None, randn(gates * hidden)))
    args = (randn(steps, batch, gates * hidden), *packed, bias, *states, chance.random() < 0.5)
    return Case(f"{steps}-{batch}-{hidden}-{rank}", args, (torch.float32,), ONE_STEP)


ODD: dict[str, Callable[[Random], Case]] = {
    "conv_chain": conv_chain_case,
    "conv_chain_int8": conv_chain_int8_case,
    "linear_chain": linear_chain_case,
    "linear_chain_int8": linear_chain_int8_case,
    "linear_chain_float8": linear_chain_float8_case,
    "low_rank_gru_int8": lambda chance: _cell_int8_case(chance, 3),
    "low_rank_lstm_int8": lambda chance: _cell_int8_case(chance, 4),
    "weight_only_linear": weight_only_linear_case,
    "low_rank_gru": lambda chance: _cell_case(chance, 3),
    "low_rank_lstm": lambda chance: _cell_case(chance, 4),
    "level_conv2d": level_conv2d_case,
    "sparse_conv2d": sparse_conv2d_case,
    "sparse_linear": sparse_linear_case,
    "tensor_chain": tensor_chain_case,
}


def _conv_once(values: Tensor, activation: str) -> Iterator[Case]:
    stage = Stage(1, 1)
    for lanes, dtypes in DTYPES_OF.items():
        packed = [stage.pack(torch.ones(stage.shape), lanes)]
        yield Case(
            f"{lanes}",
            (values[None, None, None], packed, None, None, stage.integers(), activation, lanes),
            dtypes,
        )


def _linear_once(values: Tensor, activation: str) -> Iterator[Case]:
    for lanes in ("channels", "pairs"):
        packed = [Stage(1, 1).pack(torch.ones(1, 1, 1, 1), lanes)]  # type: ignore[arg-type]
        yield Case(lanes, (values[:, None], packed, None, None, [1, 1], activation), DTYPES_OF[lanes])


def _tensor_once(values: Tensor, activation: str) -> Iterator[Case]:
    (step,) = tensor_chain.train_program((1,), (1,), ())
    yield Case(
        "train",
        (values[:, None], [step.pack(torch.ones(1, 1, 1, 1))], None, None, step.integers(), activation),
        BOTH,
    )


def _sparse_linear_once(values: Tensor, activation: str) -> Iterator[Case]:
    for width in CYCLES:
        yield Case(
            f"{width}",
            (values[:, None], *pack(torch.ones(1, 1), width), None, None, 1, activation, None, None),
            BOTH,
        )


def _sparse_conv_once(values: Tensor, activation: str) -> Iterator[Case]:
    for width in CYCLES:
        packed = pack(torch.ones(1, 1, 1, 1), width)
        yield Case(
            f"{width}",
            (values[None, None, None], *packed, None, None, Stage(1, 1).integers(), activation, None, None),
            BOTH,
        )


def _level_conv_once(values: Tensor, activation: str) -> Iterator[Case]:
    for levels in (1, 17):
        packed = pack_levels(torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.ones(levels))
        yield Case(
            f"{levels}",
            (values[None, None, None], *packed, None, None, Stage(1, 1).integers(), activation),
            BOTH,
        )


_ONCE: dict[str, Callable[[Tensor, str], Iterator[Case]]] = {
    "conv_chain": _conv_once,
    "linear_chain": _linear_once,
    "level_conv2d": _level_conv_once,
    "sparse_conv2d": _sparse_conv_once,
    "sparse_linear": _sparse_linear_once,
    "tensor_chain": _tensor_once,
}
WITH_ACTIVATION = list(_ONCE)


def one_to_one(name: str, values: Tensor, activation: str) -> Iterator[Case]:
    """Layers of one channel and weight 1: their output is the activation of `values`."""
    return _ONCE[name](values, activation)
