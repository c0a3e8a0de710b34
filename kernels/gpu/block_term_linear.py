"""`block_term_linear`: a linear layer stored as block terms, on x cut in p parts.

y = last h + bias with `h[(b s)] = sum_pr core[b, (p r), s] sum_i first[(b r), i] x[(p i)]`.

Two launches.  In the first a program makes one block b of h for a few rows, part by part, and what comes
between first and core never leaves the chip; in the second `last`, the bias, the residual and the activation.
One launch would hold all blocks of h at a time, which makes the core a full matrix instead of b blocks on its
diagonal: b times its work, to save writing b s numbers a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from tdpass.errors import KernelError, UnsupportedError
from tdpass.kernels.gpu.gemm import Epilogue, gemm
from tdpass.kernels.gpu.language import (
    LARGEST_RANK,
    Precision,
    bias_of,
    blocks,
    check,
    jit,
    on_device,
    power,
    precision_of,
    product,
    triton_type,
)
from tdpass.kernels.gpu.matrix import Matrix, flat
from tdpass.kernels.gpu.tuning import Config, bucket, choose
from tdpass.kernels.gpu.weights import empty_rows, kept, rows_of

_LARGEST_TILE = (
    1 << 16
)  # bytes of one block's core for one part; float32 without tensor cores counts as four times as wide


@jit
def block_kernel(
    x: tl.tensor,
    first: tl.tensor,
    core: tl.tensor,
    h: tl.tensor,
    rows: tl.tensor,
    parts: tl.tensor,
    length: tl.tensor,
    rank_r: tl.tensor,
    rank_s: tl.tensor,
    x_step: tl.tensor,
    first_step: tl.tensor,
    core_block: tl.tensor,
    core_part: tl.tensor,
    core_row: tl.tensor,
    h_step: tl.tensor,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
    block_r: tl.constexpr,
    block_s: tl.constexpr,
    compute: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """Block `program_id(1)` of h for `block_m` rows; `core[b, p, s, r]`, `first[(b r), i]`."""
    m, b = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.program_id(1)
    r, s = tl.arange(0, block_r), tl.arange(0, block_s)
    far = m.to(tl.int64)[:, None]
    block_first = first + (b * rank_r + r)[None, :] * first_step
    block_core = core + b * core_block + s[None, :] * core_row + r[:, None]
    total = tl.zeros((block_m, block_s), tl.float32)
    for p in range(parts):
        made = tl.zeros((block_m, block_r), tl.float32)
        for start in range(0, length, block_k):
            k = start + tl.arange(0, block_k)
            seen = tl.load(
                x + far * x_step + p * length + k[None, :],
                mask=(m[:, None] < rows) & (k[None, :] < length),
                other=0.0,
            )
            weight = tl.load(
                block_first + k[:, None], mask=(r[None, :] < rank_r) & (k[:, None] < length), other=0.0
            )
            made = product(seen, weight, made, compute, precision)
        weight = tl.load(
            block_core + p * core_part, mask=(r[:, None] < rank_r) & (s[None, :] < rank_s), other=0.0
        )
        total = product(made.to(compute), weight, total, compute, precision)
    mask = (m[:, None] < rows) & (s[None, :] < rank_s)
    tl.store(h + far * h_step + b * rank_s + s[None, :], total.to(h.dtype.element_ty), mask=mask)


def block_term_linear(
    x: Tensor,
    first: Tensor,
    core: Tensor,
    last: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """The block-term layer on the last axis of x, `y[.., o] = activation(z[.., o] + bias + residual)`.

    `z[.., o] = sum_bs last[o, (b s)] sum_pr core[b, (p r), s] sum_i first[(b r), i] x[.., (p i)]`.

    float32, float16 or bfloat16; Raises `UnsupportedError` where s and r, at most 256 each, are too large for
    s r numbers to fit on chip.
    """
    check(x, activation, first, core, last, bias, residual)
    b, deep, s = core.shape
    parts, r = x.shape[-1] // first.shape[1], first.shape[0] // b
    if (parts * first.shape[1], b * r, parts * r, b * s) != (
        x.shape[-1],
        first.shape[0],
        deep,
        last.shape[1],
    ):
        raise KernelError(
            f"x{tuple(x.shape)}, first{tuple(first.shape)}, core{tuple(core.shape)} and "
            f"last{tuple(last.shape)} do not fit; "
            "they are [.., (p i)], [(b r), i], [b, (p r), s] and [o, (b s)]"
        )
    way = precision_of(x, "matmul", precision)
    tile = power(r) * power(s) * (4 * x.dtype.itemsize if way != "tf32" else x.dtype.itemsize)
    if max(r, s) > LARGEST_RANK or tile > _LARGEST_TILE or x.dtype == torch.float8_e4m3fn:
        raise UnsupportedError(
            f"block_term_linear cannot hold the core of a block of ranks ({s}, {r}) in {x.dtype}; the "
            "operator's reference serves it"
        )
    y = torch.empty((*x.shape[:-1], last.shape[0]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = flat(x)
    hidden = empty_rows(len(rows), b * s, x, x.dtype)
    rest = None if residual is None else Matrix.of(flat(residual.expand(y.shape)))
    call = _Call(rows, rows_of(first, x.dtype), _core_rows(core, parts, x.dtype), hidden, way)
    with on_device(x):
        key = (bucket(len(rows)), parts, first.shape[1], b, s, r, x.dtype, way)
        call.run(config or choose("block_term_linear", key, x, call.candidates, call.run))
        gemm(
            Matrix.of(hidden),
            last,
            Matrix.of(flat(y)),
            Epilogue(bias_of(bias, y.shape[-1]), rest, activation),
            way,
        )
    return y


def _core_rows(core: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """`[b, p, s, r]` with rows apart by a multiple of 16 numbers."""

    def make() -> Tensor:
        b, deep, s = core.shape
        made = empty_rows(b * parts * s, deep // parts, core, dtype)
        made.copy_(core.reshape(b, parts, -1, s).transpose(2, 3).flatten(0, 2))
        return made.view(b, parts, s, -1)

    return kept([core], ("blocks", parts, dtype), make)


@dataclass(frozen=True)
class _Call:
    x: Tensor
    first: Tensor
    core: Tensor
    hidden: Tensor
    precision: Precision

    def run(self, config: Config) -> None:
        """Launch the first of the two kernels."""
        b, parts, s, r = self.core.shape
        block_kernel[blocks(len(self.x), config["m"]), b](
            x=self.x,
            first=self.first,
            core=self.core,
            h=self.hidden,
            rows=len(self.x),
            parts=parts,
            length=self.first.shape[1],
            rank_r=r,
            rank_s=s,
            x_step=self.x.stride(0),
            first_step=self.first.stride(0),
            core_block=self.core.stride(0),
            core_part=self.core.stride(1),
            core_row=self.core.stride(2),
            h_step=self.hidden.stride(0),
            block_m=config["m"],
            block_k=min(config["k"], power(self.first.shape[1])),
            block_r=power(r),
            block_s=power(s),
            compute=triton_type(self.x.dtype),
            precision=self.precision,
            num_warps=config["warps"],
            num_stages=config["stages"],
        )

    def candidates(self) -> list[Config]:
        """Configurations worth timing, the default first."""
        _, _, s, r = self.core.shape
        wide = power(r) + power(s) > LARGEST_RANK
        shapes = ((16, 16, 4, 2), (32, 16, 8, 2)) if self.precision != "tf32" or wide else _TENSOR_CORES
        listed = [dict(zip(("m", "k", "warps", "stages"), shape, strict=True)) for shape in shapes]
        return [listed[0], *(config for config in listed[1:] if config["m"] <= power(len(self.x)))]


_TENSOR_CORES = (
    (64, 32, 4, 3),
    (32, 32, 4, 3),
    (16, 64, 4, 3),
    (128, 32, 8, 3),
    (64, 64, 4, 3),
    (128, 64, 8, 3),
)
