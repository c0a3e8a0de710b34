"""`svd_linear`: y = activation((x v^T) u^T + bias + residual), `x v^T[tokens, rank]` never in memory.

A program holds the hidden values of a few rows, at most 256 of them per row, and goes through the columns of
y with them.  Where there are too few rows to fill the device so, or the rank is larger, two products run
instead, the first split along its depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels.gpu.gemm import Epilogue, launch
from tdpass.kernels.gpu.gemm import candidates as tiles
from tdpass.kernels.gpu.language import (
    LARGEST_RANK,
    Precision,
    activation_of,
    bias_of,
    blocks,
    check,
    finish,
    jit,
    on_device,
    power,
    precision_of,
    product,
    triton_type,
)
from tdpass.kernels.gpu.matrix import Matrix, flat
from tdpass.kernels.gpu.tuning import Config, bucket, choose
from tdpass.kernels.gpu.weights import empty_rows, rows_of

_FP8 = torch.float8_e4m3fn
_SPLITS = 8


@jit
def svd_kernel(
    x: tl.tensor,
    v: tl.tensor,
    u: tl.tensor,
    scale_v: tl.tensor,
    scale_u: tl.tensor,
    bias: tl.tensor,
    rest: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    depth: tl.tensor,
    rank: tl.tensor,
    columns: tl.tensor,
    x_step: tl.tensor,
    v_step: tl.tensor,
    u_step: tl.tensor,
    rest_step: tl.tensor,
    y_step: tl.tensor,
    share: tl.tensor,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    activation: tl.constexpr,
    scaled: tl.constexpr,
    biased: tl.constexpr,
    rested: tl.constexpr,
    compute: tl.constexpr,
    between: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """`block_m` rows and columns `program_id(1) * share` onwards.

    Programs of the same rows make the hidden values anew.
    """
    m, r = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.arange(0, block_r)
    far, in_rank = m.to(tl.int64)[:, None], r < rank
    hidden = tl.zeros((block_m, block_r), tl.float32)
    for start in range(0, depth, block_k):
        k = start + tl.arange(0, block_k)
        a = tl.load(x + far * x_step + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < depth), other=0.0)
        b = tl.load(
            v + r[None, :] * v_step + k[:, None], mask=in_rank[None, :] & (k[:, None] < depth), other=0.0
        )
        hidden = product(a, b, hidden, compute, precision)
    if scaled:
        hidden *= tl.load(scale_v + r, mask=in_rank, other=0.0)[None, :]
    h = hidden.to(between)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, columns), block_n):
        n = start + tl.arange(0, block_n)
        there = n[None, :] < columns
        b = tl.load(
            u + n.to(tl.int64)[None, :] * u_step + r[:, None], mask=there & in_rank[:, None], other=0.0
        )
        total = product(h, b, tl.zeros((block_m, block_n), tl.float32), between, precision)
        if scaled:
            total *= tl.load(scale_u + n[None, :], mask=there, other=0.0)
        mask = (m[:, None] < rows) & there
        total = finish(
            total,
            bias,
            rest + far * rest_step + n[None, :],
            n[None, :],
            there,
            mask,
            activation,
            biased,
            rested,
        )
        tl.store(y + far * y_step + n[None, :], total.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Scales:
    """What the numbers of float8 operands stand for: `x * x8`, `v[r] * v8[r, i]`, `u[o] * u8[o, r]`.

    Each float32.
    """

    x: Tensor | float
    v: Tensor
    u: Tensor


def svd_linear(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    *,
    scales: Scales | None = None,
    dtype: torch.dtype | None = None,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """`y[..., o] = activation(sum_r u[o, r] sum_i v[r, i] x[..., i] + bias[o] + residual[..., o])`.

    float32, float16, bfloat16, or float8 (e4m3) weights with `scales`, then with x in float8 or wider; hidden
    values are rounded to the type of x, to bfloat16 where that is float8, and y has that type unless `dtype`
    says another.  `precision` says how float32 is multiplied, torch's setting by default; `config` skips the
    tuner.
    """
    check(x, activation, v, u, bias, residual)
    rank, columns = v.shape[0], u.shape[0]
    if x.shape[-1] != v.shape[1] or u.shape[1] != rank:
        raise KernelError(
            f"x{tuple(x.shape)}, v{tuple(v.shape)} and u{tuple(u.shape)} do not fit; they are [..., i], "
            "[rank, i] and [o, rank]"
        )
    if (
        (scales is None) != (v.dtype != _FP8)
        or (v.dtype != u.dtype and scales is not None)
        or x.dtype == _FP8 != v.dtype
    ):
        raise KernelError(
            f"x, v and u are {x.dtype}, {v.dtype} and {u.dtype}; float8 weights come in pairs and with "
            "scales, float8 inputs with such weights"
        )
    wide = torch.bfloat16 if x.dtype == _FP8 else x.dtype
    y = torch.empty((*x.shape[:-1], columns), dtype=dtype or wide, device=x.device)
    if y.numel() == 0:
        return y
    call = _Call(
        flat(x),
        rows_of(v, v.dtype if scales else x.dtype),
        rows_of(u, u.dtype if scales else x.dtype),
        wide,
        None if scales is None else (scales.v.float() * scales.x).contiguous(),
        None if scales is None else scales.u.float().contiguous(),
        bias_of(bias, columns),
        None if residual is None else flat(residual.expand(y.shape)),
        flat(y),
        activation,
        precision_of(x, "matmul", precision),
    )
    rows = call.x.shape[0]
    key = (bucket(rows), v.shape[1], rank, columns, x.dtype, v.dtype, call.precision, residual is not None)
    with on_device(x):
        call.run(
            config
            or choose(
                "svd_linear",
                key,
                x,
                lambda: candidates(rows, rank, columns, v.shape[1], wide, call.precision != "tf32"),
                call.run,
            )
        )
    return y


@dataclass(frozen=True)
class _Call:
    x: Tensor
    v: Tensor
    u: Tensor
    wide: torch.dtype
    scale_v: Tensor | None
    scale_u: Tensor | None
    bias: Tensor | None
    rest: Tensor | None
    y: Tensor
    activation: str
    precision: Precision

    def run(self, config: Config) -> None:
        """Launch as a configuration says: `programs` per row block fused, or two products with `splits`."""
        if config["fused"]:
            self._fused(config)
        else:
            self._in_two(config)

    def _fused(self, config: Config) -> None:
        rank, columns, rest = self.v.shape[0], self.y.shape[1], self.y if self.rest is None else self.rest
        share = blocks(blocks(columns, config["programs"]), config["n"]) * config["n"]
        compute = self.x.dtype if self.x.dtype == self.v.dtype else self.wide
        svd_kernel[blocks(len(self.x), config["m"]), blocks(columns, share)](
            x=self.x,
            v=self.v,
            u=self.u,
            scale_v=self.scale_v,
            scale_u=self.scale_u,
            bias=self.bias,
            rest=rest,
            y=self.y,
            rows=len(self.x),
            depth=self.x.shape[1],
            rank=rank,
            columns=columns,
            x_step=self.x.stride(0),
            v_step=self.v.stride(0),
            u_step=self.u.stride(0),
            rest_step=rest.stride(0),
            y_step=self.y.stride(0),
            share=share,
            block_m=config["m"],
            block_k=config["k"],
            block_n=config["n"],
            block_r=power(rank),
            activation=activation_of(self.activation),
            scaled=self.scale_v is not None,
            biased=self.bias is not None,
            rested=self.rest is not None,
            compute=triton_type(compute),
            between=triton_type(self.wide),
            precision=self.precision,
            num_warps=config["warps"],
            num_stages=config["stages"],
        )

    def _in_two(self, config: Config) -> None:
        rows, rank, splits = len(self.x), self.v.shape[0], config["programs"]
        compute = self.x.dtype if self.x.dtype == self.v.dtype else self.wide
        made = empty_rows(splits * rows, rank, self.x, torch.float32 if splits > 1 else self.wide)
        hidden = made.view(splits, rows, rank)
        between = Matrix(hidden if splits > 1 else made, rows, rank, rows, 0, made.stride(0), 1)
        launch(
            Matrix.of(self.x),
            self.v,
            between,
            Epilogue(scale=self.scale_v),
            compute,
            self.precision,
            config,
            splits=splits,
        )
        rest = None if self.rest is None else Matrix.of(self.rest)
        last = Epilogue(self.bias, rest, self.activation, self.scale_u)
        shallow = config if splits == 1 else {**config, "k": 32, "stages": 2}  # every share is read in turn
        launch(between, self.u, Matrix.of(self.y), last, self.wide, self.precision, shallow, parts=splits)


def candidates(
    rows: int, rank: int, columns: int, depth: int, dtype: torch.dtype, plain: bool
) -> list[Config]:
    """Configurations worth timing, the default first.

    `plain` is float32 without tensor cores, or in three products, and takes small tiles.
    """
    two = [
        {"fused": 0, "programs": splits, **tile}
        for tile in tiles(rows, max(rank, 64), depth, plain)
        for splits in _splits(rows, depth)
    ]
    if rank > LARGEST_RANK or (plain and rank > LARGEST_RANK // 2):
        return two
    high = rank > LARGEST_RANK // 2
    shapes = [(64, 32, 32, 8, 2), (64, 32, 64, 8, 2)] if high else [(64, 32, 64, 4, 2)]
    if plain:
        shapes = [(32, 32, 32, 4, 2), (16, 32, 32, 4, 2)]
    else:
        shapes += [
            (128, 64, 64, 8, 3),
            (128, 32, 128, 8, 3),
            (64, 64, 128, 8 if high else 4, 3),
            (32, 64, 64, 4, 3),
            (16, 128, 64, 4, 3),
        ]
    most = power(rows)
    programs = [1, 2, 4] if rows > 64 else [4, 16]
    fused = [
        {"fused": 1, "programs": count, **dict(zip(("m", "k", "n", "warps", "stages"), shape, strict=True))}
        for shape in shapes if shape[0] <= 2 * most
        for count in programs if count <= blocks(columns, shape[2])
    ]  # fmt: skip
    return (
        two + fused if rows <= LARGEST_RANK or not fused or (high and dtype == torch.float32) else fused + two
    )


def _splits(rows: int, depth: int) -> list[int]:
    """Shares of the depth: more than one only where the rows alone do not fill a device."""
    return [1] if rows > LARGEST_RANK or depth < 512 else [_SPLITS, 1, 2 * _SPLITS]
