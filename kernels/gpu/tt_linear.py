"""`tt_linear`: a linear layer stored as a tensor train of two to four cores.

`W[(o1 .. od), (i1 .. id)] = G_1[o1, i1] .. G_d[od, id]`.

Cores are small and tensor cores are not: neighbours are multiplied together beforehand (a few thousand
numbers, made once per weight) until two are left, `W[(o, o'), (i, i')] = sum_r A[r, o, i] B[r, o', i']`, cut
where that costs least.  One kernel then makes `h[i, o'] = sum_i' x[i, i'] B[r, o', i']` and adds `A[r, o, i]
h[i, o']` to its tile of y, rank by rank, h staying on chip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from tdpass.errors import KernelError, UnsupportedError
from tdpass.kernels.gpu.language import (
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
from tdpass.kernels.gpu.matrix import flat
from tdpass.kernels.gpu.tuning import Config, bucket, choose
from tdpass.kernels.gpu.weights import kept

_CORES = range(2, 5)
_LONGEST = 256  # i' of two cores, a side of the tile of x that is held


@jit
def tt_kernel(
    x: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    bias: tl.tensor,
    rest: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rank: tl.tensor,
    out_left: tl.tensor,
    out_right: tl.tensor,
    in_left: tl.tensor,
    in_right: tl.tensor,
    x_step: tl.tensor,
    rest_step: tl.tensor,
    y_step: tl.tensor,
    block_t: tl.constexpr,
    block_ol: tl.constexpr,
    block_or: tl.constexpr,
    block_il: tl.constexpr,
    block_ir: tl.constexpr,
    activation: tl.constexpr,
    biased: tl.constexpr,
    rested: tl.constexpr,
    compute: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """A tile `[o, (token, o')]` of y; `a[r, o, i]` and `b[r, o', i']` are contiguous."""
    first = tl.program_id(0) * block_t
    right = tl.program_id(1) * block_or + tl.arange(0, block_or)
    left = tl.program_id(2) * block_ol + tl.arange(0, block_ol)
    deep = tl.arange(0, block_ir)
    lines = tl.arange(0, block_t * block_il)  # (token, i)
    token, line = first + lines // block_il, lines % block_il
    near = x + token.to(tl.int64)[:, None] * x_step + deep[None, :]
    in_b = (right[None, :] < out_right) & (deep[:, None] < in_right)
    total = tl.zeros((block_ol, block_t * block_or), tl.float32)
    for start in range(0, in_left, block_il):
        i = start + line
        in_x = (token[:, None] < tokens) & (i[:, None] < in_left) & (deep[None, :] < in_right)
        seen = tl.load(near + i[:, None] * in_right, mask=in_x, other=0.0)
        across = start + tl.arange(0, block_il)
        in_a = (left[:, None] < out_left) & (across[None, :] < in_left)
        for r in range(rank):
            inner = tl.load(
                b + (r * out_right + right[None, :]) * in_right + deep[:, None], mask=in_b, other=0.0
            )
            h = product(
                seen, inner, tl.zeros((block_t * block_il, block_or), tl.float32), compute, precision
            ).to(compute)
            h = tl.permute(tl.reshape(h, (block_t, block_il, block_or)), (1, 0, 2))
            outer = tl.load(
                a + (r * out_left + left[:, None]) * in_left + across[None, :], mask=in_a, other=0.0
            )
            total = product(outer, tl.reshape(h, (block_il, block_t * block_or)), total, compute, precision)
    columns = tl.arange(0, block_t * block_or)  # (token, o')
    token, o = first + columns // block_or, tl.program_id(1) * block_or + columns % block_or
    place = left[:, None] * out_right + o[None, :]
    mask = (left[:, None] < out_left) & (o[None, :] < out_right) & (token[None, :] < tokens)
    far = token.to(tl.int64)[None, :]
    total = finish(total, bias, rest + far * rest_step + place, place, mask, mask, activation, biased, rested)
    tl.store(y + far * y_step + place, total.to(y.dtype.element_ty), mask=mask)


def tt_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """The layer on the last axis of x, `y[.., (o1 .. od)] = activation(z + bias + residual)`.

    `z = sum_i G_1[o1, i1] .. G_d[od, id] x[.., (i1 .. id)]`, cores `[r, o_k, i_k, r']`.

    Two to four cores; float32, float16 or bfloat16.  Raises `UnsupportedError` where both ways of leaving two
    cores are too wide.
    """
    check(x, activation, *cores, bias, residual)
    outs, ins, bonds = (
        [core.shape[1] for core in cores],
        [core.shape[2] for core in cores],
        [core.shape[3] for core in cores],
    )
    if len(cores) not in _CORES:
        raise UnsupportedError(
            f"tt_linear takes {_CORES.start} to {_CORES.stop - 1} cores, not {len(cores)}; the operator's "
            "reference serves them"
        )
    fits = [core.shape[0] for core in cores] == [1, *bonds[:-1]] and bonds[-1] == 1
    if not fits or x.shape[-1] != math.prod(ins):
        raise KernelError(
            f"cores {[tuple(core.shape) for core in cores]} do not fit x{tuple(x.shape)}; they are [r, o, "
            "i, r'] with equal neighbouring ranks"
        )
    if x.dtype == torch.float8_e4m3fn:
        raise UnsupportedError("tt_linear has no scales for float8; give it float16 or bfloat16")
    split = cut(outs, ins, bonds)
    left, right = (_merged(cores, split, side, x.dtype) for side in (0, 1))
    y = torch.empty((*x.shape[:-1], math.prod(outs)), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rest = None if residual is None else flat(residual.expand(y.shape))
    call = _Call(
        flat(x),
        left,
        right,
        bias_of(bias, y.shape[-1]),
        rest,
        flat(y),
        activation,
        precision_of(x, "matmul", precision),
    )
    key = (bucket(len(call.x)), *left.shape, *right.shape, x.dtype, call.precision, residual is not None)
    with on_device(x):
        call.run(config or choose("tt_linear", key, x, call.candidates, call.run))
    return y


def cut(outs: Sequence[int], ins: Sequence[int], bonds: Sequence[int]) -> int:
    """How many cores go to the left, so that two products cost least.

    Raises `UnsupportedError` where none leaves a tile that fits.
    """

    def cost(k: int) -> int:
        return bonds[k - 1] * (math.prod(outs[k:]) * math.prod(ins) + math.prod(ins[:k]) * math.prod(outs))

    fitting = [k for k in range(1, len(outs)) if math.prod(ins[k:]) <= _LONGEST]
    if not fitting:
        raise UnsupportedError(
            f"the last input factor of {tuple(ins)} is over {_LONGEST}; split it further, or let the "
            "operator's reference serve it"
        )
    return min(fitting, key=cost)


def _merged(cores: Sequence[Tensor], split: int, side: int, dtype: torch.dtype) -> Tensor:
    """The cores of one side as one, `[r, o, i]`; made again where any of them changes."""
    chosen = cores[:split] if side == 0 else cores[split:]

    def make() -> Tensor:
        whole = chosen[0].double()
        for core in chosen[1:]:
            p, o, i, _ = whole.shape
            _, o2, i2, s = core.shape
            whole = torch.einsum("poir,rabs->poaibs", whole, core.double()).reshape(p, o * o2, i * i2, s)
        return (whole[0].permute(2, 0, 1) if side == 0 else whole[..., 0]).to(dtype).contiguous()

    return kept(chosen, ("train", side, dtype), make)


@dataclass(frozen=True)
class _Call:
    x: Tensor
    left: Tensor
    right: Tensor
    bias: Tensor | None
    rest: Tensor | None
    y: Tensor
    activation: str
    precision: Precision

    def run(self, config: Config) -> None:
        """One launch."""
        rank, out_left, in_left = self.left.shape
        _, out_right, in_right = self.right.shape
        rest = self.y if self.rest is None else self.rest
        block_ol, block_or = min(config["ol"], power(out_left)), min(config["or"], power(out_right))
        grid = (blocks(len(self.x), config["t"]), blocks(out_right, block_or), blocks(out_left, block_ol))
        tt_kernel[grid](
            x=self.x,
            a=self.left,
            b=self.right,
            bias=self.bias,
            rest=rest,
            y=self.y,
            tokens=len(self.x),
            rank=rank,
            out_left=out_left,
            out_right=out_right,
            in_left=in_left,
            in_right=in_right,
            x_step=self.x.stride(0),
            rest_step=rest.stride(0),
            y_step=self.y.stride(0),
            block_t=config["t"],
            block_ol=block_ol,
            block_or=block_or,
            block_il=min(config["il"], power(in_left)),
            block_ir=power(in_right),
            activation=activation_of(self.activation),
            biased=self.bias is not None,
            rested=self.rest is not None,
            compute=triton_type(self.x.dtype),
            precision=self.precision,
            num_warps=config["warps"],
            num_stages=config["stages"],
        )

    def candidates(self) -> list[Config]:
        """Configurations worth timing, the default first.

        Tokens, o, o' and i per tile, of which tokens times i and times o' multiply.
        """
        deep = power(self.right.shape[2])
        on_tensor_cores = _DEEP if deep > _LONGEST // 4 else _TENSOR_CORES
        shapes = on_tensor_cores if self.precision == "tf32" else _PLAIN
        listed = [
            dict(zip(("t", "ol", "or", "il", "warps", "stages"), shape, strict=True)) for shape in shapes
        ]
        return [listed[0], *(config for config in listed[1:] if config["t"] <= bucket(len(self.x)))]


_PLAIN = ((2, 32, 16, 16, 4, 1), (1, 32, 32, 16, 4, 1), (1, 64, 32, 16, 8, 1), (4, 32, 16, 16, 8, 1))
_DEEP = ((2, 64, 32, 16, 4, 2), (4, 64, 16, 16, 4, 2), (1, 64, 64, 16, 4, 2), (4, 64, 32, 16, 8, 2))
_TENSOR_CORES = (
    (4, 64, 32, 16, 4, 2),
    (2, 64, 64, 32, 4, 2),
    (8, 64, 16, 16, 8, 2),
    (4, 64, 64, 32, 8, 2),
    (4, 128, 32, 32, 8, 2),
    (1, 64, 64, 16, 4, 3),
)
