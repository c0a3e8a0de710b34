"""`tucker2_conv2d`: a 1x1, a k x k and a 1x1 convolution.

y = activation(last * (core * (first * x)) + bias + residual).

The core is an implicit matrix product over (tap, channel), positions times channels, nothing unfolded in
memory.

- The last stage reads the core's tile of at most 256 channels where it is made, so the core's output is never
  written.
- The first stage is a launch of its own wherever windows overlap.  Triton cannot address a shifted part of
  a tile on chip, so a fused first stage is made anew for every tap, `taps i r` multiply-adds per output
  instead of `i r` per input; what the launch writes has only r channels and mostly stays in the
  second-level cache.  Where windows do not overlap (stride at least the reach of the kernel, as in patch
  embeddings) or x has at most 16 channels the tuner also tries all three stages in one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels.gpu.conv_kernel import conv_kernel
from tdpass.kernels.gpu.gemm import Epilogue, gemm
from tdpass.kernels.gpu.language import (
    LARGEST_RANK,
    Precision,
    activation_of,
    bias_of,
    blocks,
    check,
    on_device,
    power,
    precision_of,
    triton_type,
)
from tdpass.kernels.gpu.matrix import Matrix, even
from tdpass.kernels.gpu.tuning import Config, bucket, choose
from tdpass.kernels.gpu.weights import empty_rows, kept, rows_of

Pair = tuple[int, int]
_FEW = 16  # channels of x for which a first stage made per tap costs little


@dataclass(frozen=True)
class Window:
    """How the core moves over the image; pairs are (height, width)."""

    kernel: Pair
    stride: Pair = (1, 1)
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def output_size(self, size: Sequence[int]) -> Pair:
        """Spatial size of the output."""
        reach = [
            s + b + a - d * (k - 1) - 1
            for s, b, a, d, k in zip(size, self.before, self.after, self.dilation, self.kernel, strict=True)
        ]
        return max(0, reach[0] // self.stride[0] + 1), max(0, reach[1] // self.stride[1] + 1)

    @property
    def overlaps(self) -> bool:
        """Whether two windows may read one pixel."""
        return any(
            s < d * (k - 1) + 1 for s, d, k in zip(self.stride, self.dilation, self.kernel, strict=True)
        )


def tucker2_conv2d(
    x: Tensor,
    first: Tensor | None,
    core: Tensor,
    last: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[Pair] = ((0, 0), (0, 0)),
    dilation: Sequence[int] = (1, 1),
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """The three convolutions on x, `y[n, o, p] = activation(sum_s last[o, s] h[n, s, p] + ...)`.

    `h[n, s, p] = sum_rt core[s, r, t] sum_i first[r, i] x[n, i, p stride + t dilation - before]`.

    `first[r, i]` and `last[o, s]` may have two ones for a kernel behind them, or be None (then the core reads
    x, or makes y); x has channels first or last, y lies as x does.  `padding` holds (before, after) per axis.
    `config` skips the tuner.
    """
    check(x, activation, first, core, last, bias, residual)
    first, last = None if first is None else first.flatten(1), None if last is None else last.flatten(1)
    s, r, *kernel = core.shape
    columns = s if last is None else last.shape[0]
    if (
        x.dim() != 4
        or len(kernel) != 2
        or x.shape[1] != (r if first is None else first.shape[1])
        or (first is not None and first.shape[0] != r)
    ):
        raise KernelError(
            f"x{tuple(x.shape)} and core{tuple(core.shape)} do not fit the first stage; x is [n, i, h, w], "
            "first [r, i] and core [s, r, kh, kw]"
        )
    if last is not None and last.shape[1] != s:
        raise KernelError(
            f"last{tuple(last.shape)} does not fit core{tuple(core.shape)}; they are [o, s] and [s, r, kh, "
            "kw]"
        )
    before, after = zip(*padding, strict=True)
    window = Window((kernel[0], kernel[1]), (stride[0], stride[1]), before, after, (dilation[0], dilation[1]))
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    lies = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(
        (x.shape[0], columns, *window.output_size(x.shape[2:])),
        dtype=x.dtype,
        device=x.device,
        memory_format=lies,
    )
    if y.numel() == 0:
        return y
    dtype = x.dtype
    epilogue = Epilogue(
        bias_of(bias, columns),
        None if residual is None else Matrix.image(even(residual.expand_as(y))),
        activation,
    )
    call = _Call(
        even(x),
        None if first is None else rows_of(first, dtype),
        _core_rows(core, dtype),
        None if last is None else rows_of(last, dtype),
        (s, r),
        window,
        epilogue,
        y,
        precision_of(x, "conv", precision),
    )
    key = (
        bucket(x.shape[0]),
        *x.shape[1:],
        r,
        s,
        columns,
        window,
        first is None,
        last is None,
        channels_last,
        dtype,
        call.precision,
        residual is not None,
    )
    with on_device(x):
        call.run(config or choose("tucker2_conv2d", key, x, call.candidates, call.run))
    return y


def _core_rows(core: Tensor, dtype: torch.dtype) -> Tensor:
    """`[s, tap, r]` with taps apart by a multiple of 16 numbers."""

    def make() -> Tensor:
        s, r = core.shape[:2]
        made = empty_rows(s * core.shape[2] * core.shape[3], r, core, dtype)
        made.copy_(core.flatten(2).transpose(1, 2).flatten(0, 1))
        return made.view(s, -1, r)

    return kept([core], ("core", dtype), make)


@dataclass(frozen=True)
class _Call:
    x: Tensor
    first: Tensor | None
    core: Tensor
    last: Tensor | None
    ranks: Pair
    window: Window
    epilogue: Epilogue
    y: Tensor
    precision: Precision

    def run(self, config: Config) -> None:
        """Up to three launches: first stage, core, last stage, less those `config` fuses with the core."""
        s, r = self.ranks
        n, _, h, w = self.x.shape
        with_first, with_last = (
            self.first is not None and bool(config["first"]),
            self.last is not None and bool(config["last"]),
        )
        x, y, epilogue = self.x, self.y, self.epilogue
        if self.first is not None and not with_first:
            made = empty_rows(n * h * w, r, x, x.dtype)
            gemm(Matrix.image(x), self.first, Matrix.of(made), Epilogue(), self.precision)
            x = made.view(n, h, w, r).permute(0, 3, 1, 2)
        if self.last is not None and not with_last:
            oh, ow = self.y.shape[2:]
            flat = empty_rows(n * oh * ow, s, x, x.dtype)
            y, epilogue = flat.view(n, oh, ow, s).permute(0, 3, 1, 2), Epilogue()
            self._launch(x, y, epilogue, with_first, with_last, config)
            gemm(Matrix.of(flat), self.last, Matrix.image(self.y), self.epilogue, self.precision)
        else:
            self._launch(x, y, epilogue, with_first, with_last, config)

    def _launch(
        self, x: Tensor, y: Tensor, epilogue: Epilogue, with_first: bool, with_last: bool, config: Config
    ) -> None:
        s, r = self.ranks
        n, _, oh, ow = y.shape
        window, target = self.window, Matrix.image(y)
        rest = epilogue.rest or target
        columns = y.shape[1]
        share = blocks(blocks(columns, config["programs"]), config["n"]) * config["n"]
        block_s = power(s) if with_last else min(config["n"], power(s))
        block_r = power(r) if with_first else config["k"]
        first, last = (
            self.core if self.first is None else self.first,
            self.core if self.last is None else self.last,
        )
        conv_kernel[
            blocks(n * oh * ow, config["m"]), blocks(columns, share) if with_last else blocks(s, block_s)
        ](
            x=x,
            first=first,
            core=self.core,
            last=last,
            bias=epilogue.bias,
            rest=rest.data,
            y=y,
            rows=n * oh * ow,
            channels=x.shape[1],
            rank_r=r,
            rank_s=s,
            columns=columns,
            height=x.shape[2],
            width=x.shape[3],
            out_height=oh,
            out_width=ow,
            share=share,
            x_image=x.stride(0),
            x_row=x.stride(2),
            x_step=x.stride(3),
            x_column=x.stride(1),
            first_step=first.stride(0),
            core_step=self.core.stride(0),
            tap_step=self.core.stride(1),
            last_step=last.stride(0),
            rest_outer=rest.outer,
            rest_step=rest.step,
            rest_column=rest.column,
            y_outer=target.outer,
            y_step=target.step,
            y_column=target.column,
            taps=window.kernel[0] * window.kernel[1],
            taps_wide=window.kernel[1],
            stride_h=window.stride[0],
            stride_w=window.stride[1],
            pad_h=window.before[0],
            pad_w=window.before[1],
            dilation_h=window.dilation[0],
            dilation_w=window.dilation[1],
            block_m=config["m"],
            block_k=config["k"],
            block_n=config["n"],
            block_r=block_r,
            block_s=block_s,
            with_first=with_first,
            with_last=with_last,
            activation=activation_of(epilogue.activation),
            biased=epilogue.bias is not None,
            rested=epilogue.rest is not None,
            compute=triton_type(x.dtype),
            precision=self.precision,
            num_warps=config["warps"],
            num_stages=config["stages"],
        )

    def candidates(self) -> list[Config]:
        """Configurations worth timing, the default first."""
        (s, r), plain = self.ranks, self.precision != "tf32"
        positions, limit = self.y.numel() // self.y.shape[1], LARGEST_RANK // 2 if plain else LARGEST_RANK
        high = s > LARGEST_RANK // 2
        lasts = [0, 1] if high and self.x.dtype == torch.float32 else [1, 0]
        if self.last is None or s > limit:
            lasts = [0]
        cheap = (
            self.first is not None
            and (not self.window.overlaps or self.x.shape[1] <= _FEW)
            and r <= LARGEST_RANK // 2
            and not plain
        )
        shapes = _PLAIN if plain else _TENSOR_CORES
        listed = [
            {
                "first": first,
                "last": last,
                "programs": programs,
                **dict(zip(("m", "k", "n", "warps", "stages"), shape, strict=True)),
            }
            for last in lasts
            for first in ([1, 0] if cheap else [0])
            for programs in ((1, 4) if last else (1,))
            for shape in shapes
            if shape[0] <= 2 * power(positions)
            and shape[1] <= max(2 * power(r), shapes[0][1])
            and not (last and high and shape[3] < 8)
        ]
        return listed or [
            {"first": 0, "last": 0, "programs": 1, "m": 16, "k": 16, "n": 32, "warps": 4, "stages": 2}
        ]


_PLAIN = ((32, 16, 32, 4, 2), (64, 16, 32, 8, 2), (16, 32, 32, 4, 2), (32, 16, 64, 8, 2))
_TENSOR_CORES = (
    (64, 32, 64, 4, 3),
    (64, 32, 64, 8, 2),
    (128, 32, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 64, 128, 8, 3),
    (128, 64, 128, 8, 4),
    (32, 64, 64, 4, 4),
    (16, 64, 64, 8, 3),
)
