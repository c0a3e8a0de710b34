"""Matrix product with an epilogue, `y = activation(scale (x w^T) + bias + residual)`.

Its first operand and output may be images. For few rows the depth is split over programs: each writes float32
sums of its share, and the kernel that reads them adds them up, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from tdpass.kernels.gpu.language import (
    Precision,
    activation_of,
    blocks,
    finish,
    jit,
    power,
    product,
    triton_type,
)
from tdpass.kernels.gpu.matrix import Matrix
from tdpass.kernels.gpu.tuning import Config, bucket, choose
from tdpass.kernels.gpu.weights import rows_of

_PLAIN = ((64, 64, 32, 4, 3), (32, 64, 32, 4, 2), (64, 32, 16, 4, 3), (128, 64, 16, 8, 3))
_TENSOR_CORES = (
    (64, 64, 32, 4, 3),
    (128, 64, 32, 4, 4),
    (128, 128, 32, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 16, 3),
    (64, 128, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (16, 64, 128, 4, 4),
    (16, 32, 128, 4, 4),
)
_GROUP = 8  # row blocks that share a column of weights while it is in the cache


@jit
def gemm_kernel(
    x: tl.tensor,
    w: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    rest: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    x_inner: tl.tensor,
    x_outer: tl.tensor,
    x_step: tl.tensor,
    x_column: tl.tensor,
    x_part: tl.tensor,
    w_step: tl.tensor,
    rest_inner: tl.tensor,
    rest_outer: tl.tensor,
    rest_step: tl.tensor,
    rest_column: tl.tensor,
    y_inner: tl.tensor,
    y_outer: tl.tensor,
    y_step: tl.tensor,
    y_column: tl.tensor,
    y_part: tl.tensor,
    share: tl.tensor,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group: tl.constexpr,
    parts: tl.constexpr,
    activation: tl.constexpr,
    scaled: tl.constexpr,
    biased: tl.constexpr,
    rested: tl.constexpr,
    compute: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One tile of y, or of its share number `program_id(1)`.

    `parts` matrices x are summed as they are read.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    high, wide = tl.cdiv(rows, block_m), tl.cdiv(columns, block_n)
    band = tile // (group * wide)
    tall = tl.minimum(high - band * group, group)
    inside = tile % (group * wide)
    m = (band * group + inside % tall) * block_m + tl.arange(0, block_m)
    n = (inside // tall) * block_n + tl.arange(0, block_n)
    x_rows = x + (m // x_inner).to(tl.int64) * x_outer + (m % x_inner).to(tl.int64) * x_step
    w_rows = w + n.to(tl.int64) * w_step
    total = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, share, block_k):
        k = part * share + start + tl.arange(0, block_k)
        seen = (m[:, None] < rows) & (k[None, :] < depth)
        a = tl.load(x_rows[:, None] + k[None, :] * x_column, mask=seen, other=0.0)
        for other in tl.static_range(1, parts):
            a += tl.load(x_rows[:, None] + k[None, :] * x_column + other * x_part, mask=seen, other=0.0)
        b = tl.load(
            w_rows[None, :] + k[:, None], mask=(k[:, None] < depth) & (n[None, :] < columns), other=0.0
        )
        total = product(a, b, total, compute, precision)
    if scaled:
        total *= tl.load(scale + n, mask=n < columns, other=0.0)[None, :]
    mask = (m[:, None] < rows) & (n[None, :] < columns)
    near = (m // rest_inner).to(tl.int64) * rest_outer + (m % rest_inner).to(tl.int64) * rest_step
    total = finish(
        total,
        bias,
        rest + near[:, None] + n[None, :] * rest_column,
        n[None, :],
        n[None, :] < columns,
        mask,
        activation,
        biased,
        rested,
    )
    there = (
        (m // y_inner).to(tl.int64) * y_outer
        + (m % y_inner).to(tl.int64) * y_step
        + part.to(tl.int64) * y_part
    )
    tl.store(y + there[:, None] + n[None, :] * y_column, total.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Epilogue:
    """What happens to a product before it is stored.

    A factor and a bias per column, a residual, an activation.
    """

    bias: Tensor | None = None
    rest: Matrix | None = None
    activation: str = "identity"
    scale: Tensor | None = None


def gemm(
    x: Matrix, w: Tensor, y: Matrix, epilogue: Epilogue, precision: Precision, config: Config | None = None
) -> None:
    """Fill `y[m, o]` from `x[m, i]` and `w[o, i]`.

    Float8 on one side only is widened to the type of the other.
    """
    compute = w.dtype if x.data.dtype == torch.float8_e4m3fn else x.data.dtype
    w = rows_of(w, w.dtype if w.dtype == torch.float8_e4m3fn else compute)

    def run(config: Config) -> None:
        launch(x, w, y, epilogue, compute, precision, config)

    key = (
        bucket(x.rows),
        x.columns,
        y.columns,
        x.column == 1,
        y.column == 1,
        x.data.dtype,
        w.dtype,
        y.data.dtype,
        precision,
        epilogue.rest is not None,
    )
    run(
        config
        or choose(
            "gemm", key, x.data, lambda: candidates(x.rows, y.columns, x.columns, precision != "tf32"), run
        )
    )


def candidates(rows: int, columns: int, depth: int, plain: bool) -> list[Config]:
    """Tiles worth timing, the default first.

    `plain` is float32 without tensor cores, or in three products, and takes small ones.
    """
    shapes = _PLAIN if plain else _TENSOR_CORES
    listed = [dict(zip(("m", "n", "k", "warps", "stages"), shape, strict=True)) for shape in shapes]
    most = (power(rows), power(columns), power(depth))
    fitting = [c for c in listed if c["m"] <= 2 * most[0] and c["n"] <= 2 * most[1] and c["k"] <= 2 * most[2]]
    return fitting or [{**listed[0], "m": min(64, most[0]), "n": min(64, most[1]), "k": min(32, most[2])}]


def launch(
    x: Matrix,
    w: Tensor,
    y: Matrix,
    epilogue: Epilogue,
    compute: torch.dtype,
    precision: Precision,
    config: Config,
    splits: int = 1,
    parts: int = 1,
) -> None:
    """One launch: with `splits`, y is `[splits, m, o]` of float32 shares.

    With `parts`, so is x, and its shares are added up.
    """
    rest = epilogue.rest or y
    share = blocks(blocks(x.columns, splits), config["k"]) * config["k"]
    grid = (blocks(x.rows, config["m"]) * blocks(y.columns, config["n"]), splits)
    gemm_kernel[grid](
        x=x.data,
        w=w,
        scale=epilogue.scale,
        bias=epilogue.bias,
        rest=rest.data,
        y=y.data,
        rows=x.rows,
        columns=y.columns,
        depth=x.columns,
        x_inner=x.inner,
        x_outer=x.outer,
        x_step=x.step,
        x_column=x.column,
        x_part=x.data.stride(0) if parts > 1 else 0,
        w_step=w.stride(0),
        rest_inner=rest.inner,
        rest_outer=rest.outer,
        rest_step=rest.step,
        rest_column=rest.column,
        y_inner=y.inner,
        y_outer=y.outer,
        y_step=y.step,
        y_column=y.column,
        y_part=y.data.stride(0) if splits > 1 else 0,
        share=share,
        block_m=config["m"],
        block_n=config["n"],
        block_k=config["k"],
        group=_GROUP,
        parts=parts,
        activation=activation_of(epilogue.activation),
        scaled=epilogue.scale is not None,
        biased=epilogue.bias is not None,
        rested=epilogue.rest is not None,
        compute=triton_type(compute),
        precision=precision,
        num_warps=config["warps"],
        num_stages=config["stages"],
    )
