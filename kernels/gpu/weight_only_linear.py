"""`weight_only_linear`: y = activation(Q x + U (V x) + bias + residual), codes widened in registers.

A program reads its share of Q once, as the panels lie that `weight_only` packs, and multiplies it in the
type of x.  With V in the same loop x is read once for both, and nothing of the product is written; but every
program reads all of V.  Where that is more than its share of Q, `V x` is a launch of its own, split along its
depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tdpass.kernels.gpu.gemm import Epilogue, launch
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
from tdpass.kernels.gpu.weights import kept, spaced
from tdpass.kernels.weight_only import Stored, check_stored, dense, split

_FLOATS, _BYTES, _NIBBLES, _FLOAT8 = 0, 1, 2, 3  # what codes are
_SPLITS = 8


@jit
def float8_values(codes: tl.tensor) -> tl.tensor:
    """What bytes of float8 (e4m3fn) stand for: whatever the device, by the bits of float32.

    Numbers below 2^-6 have no leading one, and count in steps of 2^-9.
    """
    magnitude = (codes & 0x7F).to(tl.int32)
    large = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, large)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(codes > 0x7F, -value, value)


@jit
def widened(
    codes: tl.tensor, scales: tl.tensor, start: tl.tensor, o: tl.tensor,
    outputs: tl.tensor, inputs: tl.tensor, group: tl.tensor, groups: tl.tensor,
    block_k: tl.constexpr, block_n: tl.constexpr, kind: tl.constexpr, whole: tl.constexpr,
    zeros: tl.constexpr, compute: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The tile `[k, o]` of a stored matrix from input `start` on; `whole` where a group holds all of them.

    With `zeros` zero points lie behind the scales.
    """
    panel, lane = (o // 16).to(tl.int64)[None, :], (o % 16)[None, :]
    k, there = (start + tl.arange(0, block_k))[:, None], o[None, :] < outputs
    if kind == 2:
        depth = tl.cdiv(inputs, 8)
        word = (start // 8 + tl.arange(0, block_k // 8))[:, None]
        found = tl.load(codes + (panel * depth + word) * 16 + lane, mask=there & (word < depth), other=0)
        places = 28 - 4 * tl.arange(0, 8)
        values = tl.reshape((found[:, None, :] << places[None, :, None]) >> 28, (block_k, block_n))
    else:
        values = tl.load(codes + (panel * inputs + k) * 16 + lane, mask=there & (k < inputs), other=0)
    if kind > 0:
        if whole:
            place, known = (panel * groups + start // group) * 16 + lane, there
        else:
            place, known = (panel * groups + k // group) * 16 + lane, there & (k < inputs)
        values = float8_values(values) if kind == 3 else values.to(tl.float32)
        if zeros:
            behind = tl.cdiv(outputs, 16).to(tl.int64) * groups * 16
            values -= tl.load(scales + behind + place, mask=known, other=0.0)
        values *= tl.load(scales + place, mask=known, other=0.0)
    return values.to(compute)


@jit
def weight_only_kernel(
    x: tl.tensor, hidden: tl.tensor, bias: tl.tensor, rest: tl.tensor, y: tl.tensor,
    q_codes: tl.tensor, q_scales: tl.tensor, q_group: tl.tensor, q_groups: tl.tensor,
    v_codes: tl.tensor, v_scales: tl.tensor, v_group: tl.tensor, v_groups: tl.tensor,
    u_codes: tl.tensor, u_scales: tl.tensor, u_group: tl.tensor, u_groups: tl.tensor,
    rows: tl.tensor, depth: tl.tensor, columns: tl.tensor, rank: tl.tensor,
    x_step: tl.tensor, hidden_step: tl.tensor, hidden_part: tl.tensor,
    rest_step: tl.tensor, y_step: tl.tensor,
    q_kind: tl.constexpr, q_whole: tl.constexpr, q_zeros: tl.constexpr,
    v_kind: tl.constexpr, v_whole: tl.constexpr, u_kind: tl.constexpr, u_whole: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, block_r: tl.constexpr,
    thin: tl.constexpr, parts: tl.constexpr,
    activation: tl.constexpr, biased: tl.constexpr, rested: tl.constexpr,
    compute: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of y.

    With `thin` it has the product of U with `V x`, made here where `parts` is 0, else read in so many shares.
    """
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside, there, far = m[:, None] < rows, n[None, :] < columns, m.to(tl.int64)[:, None]
    total = tl.zeros((block_m, block_n), tl.float32)
    r = tl.arange(0, block_r)
    made = tl.zeros((block_m, block_r), tl.float32)
    for start in range(0, depth, block_k):
        k = (start + tl.arange(0, block_k))[None, :]
        a = tl.load(x + far * x_step + k, mask=inside & (k < depth), other=0.0)
        b = widened(
            q_codes, q_scales, start, n, columns, depth, q_group, q_groups,
            block_k, block_n, q_kind, q_whole, q_zeros, compute,
        )  # fmt: skip
        total = product(a, b, total, compute, precision)
        if thin and parts == 0:
            b = widened(
                v_codes, v_scales, start, r, rank, depth, v_group, v_groups,
                block_k, block_r, v_kind, v_whole, False, compute,
            )  # fmt: skip
            made = product(a, b, made, compute, precision)
    if thin:
        for start in range(0, rank, block_r):
            if parts > 0:
                place = hidden + far * hidden_step + (start + r)[None, :]
                seen = inside & ((start + r)[None, :] < rank)
                made = tl.load(place, mask=seen, other=0.0)
                for other in tl.static_range(1, parts):
                    made += tl.load(place + other * hidden_part, mask=seen, other=0.0)
            b = widened(
                u_codes, u_scales, start, n, columns, rank, u_group, u_groups,
                block_r, block_n, u_kind, u_whole, False, compute,
            )  # fmt: skip
            total = product(made, b, total, compute, precision)
    mask = inside & there
    near = rest + far * rest_step + n[None, :]
    total = finish(total, bias, near, n[None, :], there, mask, activation, biased, rested)
    tl.store(y + far * y_step + n[None, :], total.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Panels:
    """A stored matrix `[outputs, inputs]`."""

    codes: Tensor
    scales: Tensor
    outputs: int
    inputs: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Panels:
        """From what `weight_only` packs."""
        check_stored(codes, scales, *shape)
        return cls(codes.contiguous(), scales.float().contiguous(), *shape)

    @property
    def kind(self) -> int:
        """What the codes are."""
        if self.codes.is_floating_point():
            return _FLOATS
        return {torch.int32: _NIBBLES, torch.uint8: _FLOAT8}.get(self.codes.dtype, _BYTES)

    def arguments(self, name: str, block: int) -> dict[str, Any]:
        """The arguments of the kernel for it, in tiles of so many inputs."""
        groups = max(1, self.scales.shape[-2])
        group = self.inputs // groups
        return {
            f"{name}_codes": self.codes,
            f"{name}_scales": self.scales,
            f"{name}_group": group,
            f"{name}_groups": groups,
            f"{name}_kind": self.kind,
            f"{name}_whole": groups == 1 or group % block == 0,
        }

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The matrix in a type that products are made in."""
        whole = (self.outputs, self.inputs, dtype)
        return kept(
            [self.codes, self.scales],
            whole,
            lambda: spaced(dense(Stored(self.codes, self.scales), self.outputs, self.inputs, dtype), dtype),
        )


def weight_only_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """The layer on the last axis of x.

    Weights, scales and shapes `(o, i)` are those of Q alone, or of Q, V and U.  x is float32, float16
    or bfloat16, the type in which weights are multiplied.  `config` skips the tuner.
    """
    check(x, activation, *weights, *scales, bias, residual)
    matrices = tuple(Panels.of(*each) for each in zip(weights, scales, shapes, strict=True))
    columns, rank = matrices[0].outputs, matrices[1].outputs if len(matrices) > 1 else 0
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    rest = None if residual is None else flat(residual.expand(y.shape))
    way = precision_of(x, "matmul", precision)
    call = _Call(flat(x), matrices, bias_of(bias, columns), rest, flat(y), activation, way)
    rows, depth = call.x.shape
    groups = (tuple(each.scales.shape[:-1]) for each in matrices)
    key = (
        bucket(rows),
        depth,
        columns,
        rank,
        x.dtype,
        *(m.codes.dtype for m in matrices),
        *groups,
        way,
        rest is None,
    )
    with on_device(x):
        call.run(
            config
            or choose(
                "weight_only_linear", key, x, lambda: candidates(rows, rank, depth, way != "tf32"), call.run
            )
        )
    return y


@dataclass(frozen=True)
class _Call:
    x: Tensor
    matrices: tuple[Panels, ...]
    bias: Tensor | None
    rest: Tensor | None
    y: Tensor
    activation: str
    precision: Precision

    def run(self, config: Config) -> None:
        """One launch, or with `apart` two: `V x` in so many shares before it."""
        q, v, u = (*self.matrices, *self.matrices[:1] * 2)[:3]
        rows, thin, parts = len(self.x), len(self.matrices) > 1, config["apart"]
        hidden = self._hidden(v, config) if thin and parts else self.y.view(1, rows, -1)
        block_k = min(config["k"], power(q.inputs))
        block_r = block_k if parts else power(v.outputs)
        rest = self.y if self.rest is None else self.rest
        weight_only_kernel[blocks(rows, config["m"]), blocks(q.outputs, config["n"])](
            x=self.x,
            hidden=hidden,
            bias=self.bias,
            rest=rest,
            y=self.y,
            **q.arguments("q", block_k),
            q_zeros=split(q.scales)[1] is not None,
            **v.arguments("v", block_k),
            **u.arguments("u", block_r),
            rows=rows,
            depth=q.inputs,
            columns=q.outputs,
            rank=v.outputs,
            x_step=self.x.stride(0),
            hidden_step=hidden.stride(1),
            hidden_part=hidden.stride(0),
            rest_step=rest.stride(0),
            y_step=self.y.stride(0),
            block_m=config["m"],
            block_n=config["n"],
            block_k=block_k,
            block_r=block_r if thin else 16,
            thin=thin,
            parts=parts,
            activation=activation_of(self.activation),
            biased=self.bias is not None,
            rested=self.rest is not None,
            compute=triton_type(self.x.dtype),
            precision=self.precision,
            num_warps=config["warps"],
            num_stages=config["stages"],
        )

    def _hidden(self, v: Panels, config: Config) -> Tensor:
        """`V x` in float32 shares `[part, row, r]`."""
        parts, rows = config["apart"], len(self.x)
        hidden = torch.empty((parts, rows, v.outputs), dtype=torch.float32, device=self.x.device)
        y = Matrix(hidden, rows, v.outputs, rows, 0, hidden.stride(1), 1)
        launch(
            Matrix.of(self.x),
            v.rows(self.x.dtype),
            y,
            Epilogue(),
            self.x.dtype,
            self.precision,
            config,
            splits=parts,
        )
        return hidden


def candidates(rows: int, rank: int, depth: int, plain: bool) -> list[Config]:
    """Configurations worth timing, the default first.

    `plain` is float32 without tensor cores, or in three products, and takes small tiles.
    """
    few = rows <= LARGEST_RANK // 4
    on_tensor_cores = _FEW if few else _MANY
    shapes = _PLAIN if plain else on_tensor_cores
    splits = [_SPLITS, 1] if few and depth >= 512 else [1]
    apart = [0] if rank <= LARGEST_RANK // 2 else []
    if rank:
        apart += splits
    return [
        {"apart": parts, **dict(zip(("m", "n", "k", "warps", "stages"), shape, strict=True))}
        for shape in shapes
        for parts in apart
    ]


_PLAIN = ((16, 32, 32, 4, 2), (32, 32, 32, 4, 2), (64, 32, 32, 8, 2))
_FEW = ((16, 32, 64, 4, 3), (16, 32, 128, 4, 3), (16, 64, 128, 8, 3), (32, 64, 64, 4, 3), (64, 64, 64, 8, 3))
_MANY = ((64, 64, 64, 8, 2), (64, 128, 32, 8, 3), (128, 64, 64, 8, 3), (128, 128, 32, 8, 3))
