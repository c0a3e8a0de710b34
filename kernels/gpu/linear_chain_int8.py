"""`linear_chain_int8`: `y = activation(W_S .. W_1 x + bias + residual)` in whole numbers.

Of two layers a program holds the hidden values of a few rows: the products of the first are put on their grid
in registers, as int8, and multiplied on.  Where the rank is over 256, where rows are too few to fill the
device so, and in chains of another length, every layer is a launch of its own, what lies between in bytes
where its grid is known beforehand, in float32 where every row has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from tdpass.kernels.gpu.gemm import candidates as tiles
from tdpass.kernels.gpu.int8_gemm import Int8Product
from tdpass.kernels.gpu.integers import (
    LEAST_DEPTH,
    Ending,
    Factor,
    inverse_of,
    largest,
    leave,
    reach,
    read,
    shifted,
    steps_of,
    way_of,
    worth,
    zero_of,
)
from tdpass.kernels.gpu.language import LARGEST_RANK, bias_of, blocks, check_operands, jit, on_device, power
from tdpass.kernels.gpu.matrix import Matrix, flat
from tdpass.kernels.gpu.tuning import Config, bucket, choose
from tdpass.kernels.gpu.weights import empty_rows
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.stage import Stage


@jit
def pair_kernel(
    x: tl.tensor, v: tl.tensor, u: tl.tensor, scale_v: tl.tensor, scale_u: tl.tensor, shift_v: tl.tensor,
    shift_u: tl.tensor, bias: tl.tensor, rest: tl.tensor, y: tl.tensor,
    rows: tl.tensor, depth: tl.tensor, rank: tl.tensor, columns: tl.tensor,
    x_step: tl.tensor, v_step: tl.tensor, u_step: tl.tensor, rest_step: tl.tensor, y_step: tl.tensor,
    share: tl.tensor,
    x_inverse: tl.tensor, x_zero: tl.tensor, level_v: tl.tensor,
    h_inverse: tl.tensor, h_zero: tl.tensor, level_u: tl.tensor,
    rest_scale: tl.tensor, rest_zero: tl.tensor, y_inverse: tl.tensor, y_zero: tl.tensor,
    block_m: tl.constexpr, block_k: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr,
    reads: tl.constexpr, h_by_row: tl.constexpr,
    activation: tl.constexpr, biased: tl.constexpr, rested: tl.constexpr, rest_codes: tl.constexpr,
    codes: tl.constexpr,
) -> None:  # fmt: skip
    """`block_m` rows and columns `program_id(1) * share` onwards.

    Programs of the same rows make the hidden values anew.
    """
    m, r = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.arange(0, block_r)
    inside, in_rank = m < rows, r < rank
    far = m.to(tl.int64)
    lines = x + far * x_step
    inverse = x_inverse
    if reads == 2:
        span = reach(lines, inside, depth, 1, block_m, block_k)
        inverse = tl.div_rn(127.0, span)[:, None]
    products = tl.zeros((block_m, block_r), tl.int32)
    for start in range(0, depth, block_k):
        k = start + tl.arange(0, block_k)
        a = read(lines[:, None] + k[None, :], inside[:, None] & (k[None, :] < depth), inverse, x_zero, reads)
        b = tl.load(
            v + r[None, :] * v_step + k[:, None], mask=in_rank[None, :] & (k[:, None] < depth), other=0
        )
        products = tl.dot(a, b, products, out_dtype=tl.int32)
    hidden = worth(products, scale_v, shift_v, r, in_rank, level_v)
    if reads == 2:
        hidden *= tl.div_rn(span, 127.0)[:, None]
    onward = h_inverse
    if h_by_row:
        span_h = largest(tl.where(in_rank[None, :], hidden, 0.0))
        onward = tl.div_rn(127.0, span_h)[:, None]
    h = shifted(hidden * onward, h_zero)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, columns), block_n):
        n = start + tl.arange(0, block_n)
        there = n < columns
        b = tl.load(
            u + n.to(tl.int64)[None, :] * u_step + r[:, None], mask=there[None, :] & in_rank[:, None], other=0
        )
        made = tl.dot(h, b, tl.zeros((block_m, block_n), tl.int32), out_dtype=tl.int32)
        total = worth(made, scale_u, shift_u, n, there, level_u)
        if h_by_row:
            total *= tl.div_rn(span_h, 127.0)[:, None]
        mask = inside[:, None] & there[None, :]
        total = leave(
            total, bias, rest + far[:, None] * rest_step + n[None, :], n[None, :], there[None, :], mask,
            rest_scale, rest_zero, y_inverse, y_zero, activation, biased, rested, rest_codes, codes,
        )  # fmt: skip
        tl.store(y + far[:, None] * y_step + n[None, :], total.to(y.dtype.element_ty), mask=mask)


def linear_chain_int8(
    x: Tensor,
    factors: Sequence[tuple[Stage, Tensor, Tensor, Tensor]],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Grids,
    activation: str = "identity",
    *,
    config: Config | None = None,
) -> Tensor:
    """The chain on the last axis of x.

    A factor is its stage, and weight, scale and total as `int8_factor` packs them.  Numbers as those of the
    reference, whole ones exact.  x is uint8, float32, float16 or bfloat16; `config` skips the tuner for
    chains of two.
    """
    check_operands(x, activation, *(part for factor in factors for part in factor[1:]), bias, residual)
    columns = factors[-1][0].outputs
    y = torch.empty((*x.shape[:-1], columns), dtype=grids.output_dtype(x), device=x.device)
    made = [Factor.of(*factor, grid) for factor, grid in zip(factors, grids.reads, strict=True)]
    rest = None if residual is None else Matrix.of(flat(residual.expand(y.shape)))
    ending = Ending(
        bias_of(bias, columns), rest, grids.residual, activation, grids.output, inverse_of(grids.output)
    )
    call = _Call(flat(x), made, grids.reads, ending, flat(y))
    with on_device(x):
        if len(made) != 2:
            call.one_by_one(None)
        else:
            call.run(config or call.chosen())
    return y


@dataclass(frozen=True)
class _Call:
    x: Tensor
    factors: Sequence[Factor]
    reads: Sequence[Grid]
    ending: Ending
    y: Tensor

    def chosen(self) -> Config:
        """The fastest configuration of a chain of two layers."""
        rows, (rank, depth), columns = len(self.x), self.factors[0].rows.shape, self.y.shape[1]
        key = (
            bucket(rows), depth, rank, columns, self.x.dtype, self.y.dtype, *map(bool, self.reads),
            self.ending.rest is not None,
        )  # fmt: skip
        return choose(
            "linear_chain_int8", key, self.x, lambda: candidates(rows, rank, columns, depth), self.run
        )

    def run(self, config: Config) -> None:
        """Launch what a configuration says: `programs` per block of rows, fused, or layer by layer."""
        if config["fused"]:
            self._fused(config)
        else:
            self.one_by_one(config)

    def one_by_one(self, config: Config | None) -> None:
        """A launch per layer, each tuned by itself where there is no configuration."""
        read, levels = Matrix.of(self.x), steps_of(self.reads)
        for place, (factor, grid, (level, inverse)) in enumerate(
            zip(self.factors, self.reads, levels, strict=True)
        ):
            into, ending = self.y, self.ending
            if place + 1 < len(self.factors):
                ending = Ending(output=self.reads[place + 1], inverse=inverse)
                dtype = torch.uint8 if ending.output else torch.float32
                into = empty_rows(len(self.x), len(factor.rows), self.x, dtype)
            step = Int8Product(read, grid, factor, level, Matrix.of(into), ending)
            step.tuned() if config is None else step.run(config)
            read = Matrix.of(into)

    def _fused(self, config: Config) -> None:
        (v, u), (grid, between) = self.factors, self.reads
        (level_v, onward), (level_u, _) = steps_of(self.reads)
        rank, columns, y = len(v.rows), self.y.shape[1], Matrix.of(self.y)
        share = blocks(blocks(columns, config["programs"]), config["n"]) * config["n"]
        pair_kernel[blocks(len(self.x), config["m"]), blocks(columns, share)](
            x=self.x,
            v=v.rows,
            u=u.rows,
            scale_v=v.scale,
            scale_u=u.scale,
            shift_v=v.shift,
            shift_u=u.shift,
            y=self.y,
            rows=len(self.x),
            depth=self.x.shape[1],
            rank=rank,
            columns=columns,
            x_step=self.x.stride(0),
            v_step=v.rows.stride(0),
            u_step=u.rows.stride(0),
            rest_step=(self.ending.rest or y).step,
            y_step=y.step,
            share=share,
            x_inverse=inverse_of(grid),
            x_zero=zero_of(grid),
            level_v=level_v,
            h_inverse=onward,
            h_zero=zero_of(between),
            level_u=level_u,
            block_m=config["m"],
            block_k=max(config["k"], LEAST_DEPTH),
            block_n=config["n"],
            block_r=power(rank, LEAST_DEPTH),
            reads=way_of(self.x, grid),
            h_by_row=not between,
            **self.ending.arguments(y),
            num_warps=config["warps"],
            num_stages=config["stages"],
            enable_fp_fusion=False,
        )


def candidates(rows: int, rank: int, columns: int, depth: int) -> list[Config]:
    """Configurations worth timing, the default first."""
    apart = [{"fused": 0, "programs": 1, **tile} for tile in tiles(rows, max(rank, 64), depth, False)]
    if rank > LARGEST_RANK:
        return apart
    programs = (1, 2, 4) if rows > 64 else (4, 16)
    fused = [
        {"fused": 1, "programs": count, **dict(zip(("m", "k", "n", "warps", "stages"), shape, strict=True))}
        for shape in (_HIGH if rank > LARGEST_RANK // 2 else _LOW) if shape[0] <= 2 * power(rows)
        for count in programs if count <= blocks(columns, shape[2])
    ]  # fmt: skip
    return fused + apart if rows > LARGEST_RANK else apart + fused


_HIGH = (
    (64, 64, 64, 8, 2),
    (128, 64, 64, 8, 3),
    (64, 128, 64, 8, 3),
    (32, 128, 64, 8, 3),
    (16, 128, 64, 4, 3),
)
_LOW = (
    (64, 64, 64, 4, 2),
    (128, 64, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (32, 128, 64, 4, 3),
    (16, 128, 64, 4, 3),
)
