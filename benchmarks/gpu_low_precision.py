"""Layers of the GPU benchmark whose factors are stored in int8, int4 and float8, in a type of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases import Case, random
from tdpass.kernels import weight_only
from tdpass.kernels.float8_chain import LINEAR_CHAIN_FLOAT8
from tdpass.kernels.float8_chain import pack_weight as pack_float8
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_chain import CONV_CHAIN_INT8, LINEAR_CHAIN_INT8
from tdpass.kernels.int8_factor import columns, pack_weight
from tdpass.kernels.linear_chain import stages_of
from tdpass.kernels.stage import Stage, integers_of
from tdpass.kernels.weight_only import WEIGHT_ONLY_LINEAR

LINEAR = ((1, 4096, 4096, 256), (128, 768, 3072, 192), (4096, 768, 3072, 128), (4096, 4096, 4096, 256))


def _nbytes(*held: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for each in held for tensor in each)


def _svd(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Tensor, int]]:
    """Shape, x, v, u and FLOPs of linear layers of a transformer, from one token to many."""
    for tokens, i, o, r in LINEAR:
        x, v, u = (
            random(tokens, i, fan=1, dtype=dtype),
            random(r, i, fan=i, dtype=dtype),
            random(o, r, fan=r, dtype=dtype),
        )
        yield f"{tokens}x{i}x{o} r{r}", x, v, u, 2 * tokens * r * (i + o)


def _pair(
    name: str, dtype: torch.dtype, packed: Callable[[Tensor, Tensor], tuple[Callable[[Tensor], Tensor], int]]
) -> Iterator[Case]:
    for shape, x, v, u, flops in _svd(dtype):
        fused, stored = packed(v, u)
        yield Case(
            name,
            shape,
            lambda x, w: F.gelu(F.linear(x, w)),
            lambda x, v, u: F.gelu(F.linear(F.linear(x, v), u)),
            lambda x, v, u, fused=fused: fused(x),
            x,
            [v, u],
            u @ v,
            len(x) * len(u),
            flops,
            stored,
        )


def svd_int8(dtype: torch.dtype) -> Iterator[Case]:
    """Both factors in int8, every row of x and of what lies between on a grid of its own."""

    def packed(v: Tensor, u: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
        widths = [v.shape[1], len(v), len(u)]
        stages, grids = stages_of(widths), Grids((Grid(), Grid())).numbers()
        factors = columns(
            [
                pack_weight(*each)
                for each in zip(stages, (v[:, :, None, None], u[:, :, None, None]), strict=True)
            ]
        )
        return lambda x: LINEAR_CHAIN_INT8.call(x, *factors, None, None, grids, widths, "gelu"), _nbytes(
            *factors
        )

    return _pair("svd_int8", dtype, packed)


def svd_float8(dtype: torch.dtype) -> Iterator[Case]:
    """Both factors in float8; x, of standard deviation one, on a grid that reaches to eight of them."""

    def packed(v: Tensor, u: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
        weights, scales = (list(each) for each in zip(pack_float8(v), pack_float8(u), strict=True))
        end = (None, None, 8 / 448, [v.shape[1], len(v), len(u)], "gelu")
        return lambda x: LINEAR_CHAIN_FLOAT8.call(x, weights, scales, *end), _nbytes(weights, scales)

    return _pair("svd_float8", dtype, packed)


def weight_only_int4(dtype: torch.dtype) -> Iterator[Case]:
    """int4 in groups of 64, alone and beside a product of rank 32 in bfloat16, for few tokens."""
    for tokens, i, o, r in (
        (1, 4096, 4096, 0),
        (1, 4096, 4096, 32),
        (16, 4096, 11008, 0),
        (16, 4096, 11008, 32),
    ):
        x, w = random(tokens, i, fan=1, dtype=dtype), random(o, i, fan=i, dtype=dtype)
        held, thin, factors = [weight_only.pack_weight(w, 4, 64)], [r] if r else [], [w]
        if r:
            factors += [random(r, i, fan=i, dtype=dtype), random(o, r, fan=r, dtype=dtype)]
            held += [weight_only.pack_floats(factor) for factor in factors[1:]]
        weights, scales = ([part.cuda() for part in parts] for parts in zip(*held, strict=True))

        def fused(
            x: Tensor,
            *_: Tensor,
            weights: list[Tensor] = weights,
            scales: list[Tensor] = scales,
            widths: tuple[int, ...] = (i, o, *thin),
        ) -> Tensor:
            made: Tensor = WEIGHT_ONLY_LINEAR.call(x, weights, scales, None, None, widths, "identity")
            return made

        def chain(x: Tensor, w: Tensor, *thin: Tensor) -> Tensor:
            y = F.linear(x, w)
            return y + F.linear(F.linear(x, thin[0]), thin[1]) if thin else y

        whole = w + factors[2] @ factors[1] if r else w
        yield Case(
            "weight_only_int4",
            f"{tokens}x{i}x{o} r{r}",
            F.linear,
            chain,
            fused,
            x,
            factors,
            whole,
            tokens * o,
            2 * tokens * (i * o + r * (i + o)),
            _nbytes(weights, scales),
        )


def tucker2_int8(dtype: torch.dtype) -> Iterator[Case]:
    """3 x 3 convolutions of a residual network, channels last, on grids of three standard deviations."""
    for n, c, r, size in ((1, 256, 128, 14), (32, 64, 32, 56), (32, 256, 128, 14)):
        x = random(n, c, size, size, fan=1, dtype=dtype).contiguous(memory_format=torch.channels_last)
        stages = (Stage(c, r), Stage(r, r, 1, (3, 3), (1, 1), (1, 1), (1, 1)), Stage(r, c))
        factors = [
            random(*stage.shape, fan=stage.inputs * stage.kernel[0] ** 2, dtype=dtype) for stage in stages
        ]
        packed = columns([pack_weight(*each) for each in zip(stages, factors, strict=True)])
        grids, integers = Grids((Grid(3 / 127, 128),) * 3).numbers(), integers_of(stages)
        weight = torch.einsum("os,srhw,ri->oihw", factors[2].flatten(1), factors[1], factors[0].flatten(1))

        def fused(
            x: Tensor,
            *_: Tensor,
            packed: tuple[list[Tensor], ...] = packed,
            grids: list[float] = grids,
            integers: list[int] = integers,
        ) -> Tensor:
            made: Tensor = CONV_CHAIN_INT8.call(x, *packed, None, None, grids, integers, "relu")
            return made

        positions = n * size * size
        yield Case(
            "tucker2_int8", f"{n}x{c}@{size} r{r}", lambda x, w: F.relu(F.conv2d(x, w, padding=1)),
            lambda x, a, b, c: F.relu(F.conv2d(F.conv2d(F.conv2d(x, a), b, padding=1), c)),
            fused, x, factors, weight.contiguous(memory_format=torch.channels_last), positions * c,
            2 * positions * r * (2 * c + 9 * r), _nbytes(*packed),
        )  # fmt: skip


LOW_PRECISION: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "svd_int8": svd_int8,
    "svd_float8": svd_float8,
    "weight_only_int4": weight_only_int4,
    "tucker2_int8": tucker2_int8,
}
