"""Product of bytes with int8, `y = activation(scale (codes(x) w^T) + bias + residual)`, summed in 32 bits.

x is codes, or put on its grid as it is read: a grid known beforehand, or one of every row, which takes a look
at the whole row first.  y is floating point or codes of its own grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl

from tdpass.kernels.gpu.gemm import candidates as tiles
from tdpass.kernels.gpu.integers import (
    LEAST_DEPTH,
    Ending,
    Factor,
    inverse_of,
    leave,
    reach,
    read,
    way_of,
    worth,
    zero_of,
)
from tdpass.kernels.gpu.language import blocks, jit
from tdpass.kernels.gpu.matrix import Matrix
from tdpass.kernels.gpu.tuning import Config, bucket, choose
from tdpass.kernels.grid import Grid


@jit
def int8_gemm_kernel(
    x: tl.tensor, w: tl.tensor, scale: tl.tensor, shift: tl.tensor,
    bias: tl.tensor, rest: tl.tensor, y: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, depth: tl.tensor,
    x_inner: tl.tensor, x_outer: tl.tensor, x_step: tl.tensor, x_column: tl.tensor, w_step: tl.tensor,
    rest_inner: tl.tensor, rest_outer: tl.tensor, rest_step: tl.tensor, rest_column: tl.tensor,
    y_inner: tl.tensor, y_outer: tl.tensor, y_step: tl.tensor, y_column: tl.tensor,
    x_inverse: tl.tensor, x_zero: tl.tensor, level: tl.tensor,
    rest_scale: tl.tensor, rest_zero: tl.tensor, y_inverse: tl.tensor, y_zero: tl.tensor,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, reads: tl.constexpr,
    activation: tl.constexpr, biased: tl.constexpr, rested: tl.constexpr, rest_codes: tl.constexpr,
    codes: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of y."""
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside, there = m < rows, n < columns
    lines = x + (m // x_inner).to(tl.int64) * x_outer + (m % x_inner).to(tl.int64) * x_step
    inverse = x_inverse
    if reads == 2:
        span = reach(lines, inside, depth, x_column, block_m, block_k)
        inverse = tl.div_rn(127.0, span)[:, None]
    products = tl.zeros((block_m, block_n), tl.int32)
    for start in range(0, depth, block_k):
        k = start + tl.arange(0, block_k)
        seen = inside[:, None] & (k[None, :] < depth)
        a = read(lines[:, None] + k[None, :] * x_column, seen, inverse, x_zero, reads)
        b = tl.load(
            w + n.to(tl.int64)[None, :] * w_step + k[:, None],
            mask=there[None, :] & (k[:, None] < depth),
            other=0,
        )
        products = tl.dot(a, b, products, out_dtype=tl.int32)
    total = worth(products, scale, shift, n, there, level)
    if reads == 2:
        total *= tl.div_rn(span, 127.0)[:, None]
    mask = inside[:, None] & there[None, :]
    near = (m // rest_inner).to(tl.int64) * rest_outer + (m % rest_inner).to(tl.int64) * rest_step
    total = leave(
        total, bias, rest + near[:, None] + n[None, :] * rest_column, n[None, :], there[None, :], mask,
        rest_scale, rest_zero, y_inverse, y_zero, activation, biased, rested, rest_codes, codes,
    )  # fmt: skip
    far = (m // y_inner).to(tl.int64) * y_outer + (m % y_inner).to(tl.int64) * y_step
    tl.store(y + far[:, None] + n[None, :] * y_column, total.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Int8Product:
    """A stage by itself: `y[m, o]` from `x[m, i]`, x on `grid`, its products worth `level` each."""

    x: Matrix
    grid: Grid
    factor: Factor
    level: float
    y: Matrix
    ending: Ending

    def tuned(self) -> None:
        """Launch with the tile that is fastest here."""
        x, y = self.x, self.y
        key = (
            bucket(x.rows), x.columns, y.columns, x.column == 1, y.column == 1, x.data.dtype, y.data.dtype,
            bool(self.grid), self.ending.rest is not None,
        )  # fmt: skip
        self.run(
            choose("int8_gemm", key, x.data, lambda: tiles(x.rows, y.columns, x.columns, False), self.run)
        )

    def run(self, config: Config) -> None:
        """One launch."""
        x, y = self.x, self.y
        rest = self.ending.rest or y
        int8_gemm_kernel[blocks(x.rows, config["m"]), blocks(y.columns, config["n"])](
            x=x.data,
            w=self.factor.rows,
            scale=self.factor.scale,
            shift=self.factor.shift,
            y=y.data,
            rows=x.rows,
            columns=y.columns,
            depth=x.columns,
            x_inner=x.inner,
            x_outer=x.outer,
            x_step=x.step,
            x_column=x.column,
            w_step=self.factor.rows.stride(0),
            rest_inner=rest.inner,
            rest_outer=rest.outer,
            rest_step=rest.step,
            rest_column=rest.column,
            y_inner=y.inner,
            y_outer=y.outer,
            y_step=y.step,
            y_column=y.column,
            x_inverse=inverse_of(self.grid),
            x_zero=zero_of(self.grid),
            level=self.level,
            block_m=config["m"],
            block_n=config["n"],
            block_k=max(config["k"], LEAST_DEPTH),
            reads=way_of(x.data, self.grid),
            **self.ending.arguments(y),
            num_warps=config["warps"],
            num_stages=config["stages"],
            enable_fp_fusion=False,
        )
