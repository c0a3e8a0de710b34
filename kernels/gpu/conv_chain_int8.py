"""`conv_chain_int8`: a 1x1, a k x k and a 1x1 convolution in whole numbers, or fewer of them.

The first stage is a launch of its own that writes bytes on the grid of the core; the core is an implicit
matrix product over (tap, channel), as in `tucker2_conv2d`, and the last stage reads its tile of at most 256
channels where it is made, put on its grid in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.kernels.conv_chain import memory_format
from tdpass.kernels.gpu.conv_int8_kernel import conv_int8_kernel
from tdpass.kernels.gpu.int8_gemm import Int8Product
from tdpass.kernels.gpu.integers import (
    LEAST_DEPTH,
    Ending,
    Factor,
    inverse_of,
    steps_of,
    way_of,
    zero_of,
)
from tdpass.kernels.gpu.language import LARGEST_RANK, bias_of, blocks, check_operands, on_device, power
from tdpass.kernels.gpu.matrix import Matrix, even
from tdpass.kernels.gpu.tuning import Config, bucket, choose
from tdpass.kernels.gpu.weights import empty_rows, kept
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_chain import empty_output
from tdpass.kernels.stage import Stage

Packed = tuple[Stage, Tensor, Tensor, Tensor]


def conv_chain_int8(
    x: Tensor,
    factors: Sequence[Packed],
    core: int,
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Grids,
    activation: str = "identity",
    *,
    config: Config | None = None,
) -> Tensor:
    """The chain on `x[n, c, h, w]`; stage `core` may be of any size, those around it are 1x1.

    A factor is its stage, and weight, scale and total as `int8_factor` packs them.  Numbers as those of the
    reference, whole ones exact.  `config` skips the tuner.  Raises `UnsupportedError` where the core reads no
    grid that is known beforehand.
    """
    check_operands(x, activation, *(part for factor in factors for part in factor[1:]), bias, residual)
    if not grids.reads[core]:
        raise UnsupportedError("the core of a chain of convolutions reads a grid that is given")
    y = empty_output(x, [factor[0] for factor in factors], grids.output_dtype(x))
    if y.numel() == 0:
        return y
    rest = None if residual is None else Matrix.image(even(residual.expand_as(y)))
    shift = bias_of(bias, y.shape[1])
    output = inverse_of(grids.output)
    ending = Ending(shift, rest, grids.residual, activation, grids.output, output)
    call = _Call(even(x), factors, core, grids.reads, ending, y)
    key = (
        bucket(x.shape[0]), *x.shape[1:], *(factor[0] for factor in factors), memory_format(x),
        x.dtype, y.dtype, *map(bool, grids.reads), residual is not None,
    )  # fmt: skip
    with on_device(x):
        call.run(config or choose("conv_chain_int8", key, x, call.candidates, call.run))
    return y


def _core_of(stage: Stage, weight: Tensor, scale: Tensor, total: Tensor, grid: Grid) -> Factor:
    """The core as `[s, tap, r]`, rows of r apart by a multiple of 16 numbers."""

    def make() -> Tensor:
        taps = stage.kernel[0] * stage.kernel[1]
        made = empty_rows(stage.outputs * taps, stage.inputs, weight, torch.int8)
        made.copy_(stage.unpack(weight, "quads").flatten(2).transpose(1, 2).flatten(0, 1))
        return made.view(stage.outputs, taps, stage.inputs)

    return Factor.laid(kept([weight], (stage, "taps"), make), weight, scale, total, grid)


@dataclass(frozen=True)
class _Call:
    x: Tensor
    factors: Sequence[Packed]
    core: int
    reads: Sequence[Grid]
    ending: Ending
    y: Tensor

    def run(self, config: Config) -> None:
        """Up to three launches: first stage, core, and last stage unless `config` fuses it with the core."""
        x, levels = self.x, steps_of(self.reads)
        if self.core:
            stage = self.factors[0][0]
            made = empty_rows(x.shape[0] * x.shape[2] * x.shape[3], stage.outputs, x, torch.uint8)
            into = Ending(output=self.reads[1], inverse=levels[0][1])
            self._pointwise(0, Matrix.image(x), Matrix.of(made), into)
            x = made.view(x.shape[0], *x.shape[2:], stage.outputs).permute(0, 3, 1, 2)
        if self.core + 1 == len(self.factors) or config["last"]:
            self._launch(x, self.y, self.ending, config)
            return
        after = self.core + 1
        n, _, h, w = self.y.shape
        into = Ending(output=self.reads[after], inverse=levels[self.core][1])
        dtype, s = torch.uint8 if into.output else torch.float32, self.factors[after][0].inputs
        flat = empty_rows(n * h * w, s, x, dtype)
        self._launch(x, flat.view(n, h, w, s).permute(0, 3, 1, 2), into, config)
        self._pointwise(after, Matrix.of(flat), Matrix.image(self.y), self.ending)

    def _pointwise(self, place: int, x: Matrix, y: Matrix, ending: Ending) -> None:
        grid, (level, _) = self.reads[place], steps_of(self.reads)[place]
        Int8Product(x, grid, Factor.of(*self.factors[place], grid), level, y, ending).tuned()

    def _launch(self, x: Tensor, y: Tensor, ending: Ending, config: Config) -> None:
        stage, grid = self.factors[self.core][0], self.reads[self.core]
        with_last = self.core + 1 < len(self.factors) and bool(config["last"])
        core = last = _core_of(*self.factors[self.core], grid)
        levels, after = steps_of(self.reads), self.reads[self.core + with_last]
        if with_last:
            last = Factor.of(*self.factors[self.core + 1], after)
        (n, columns, oh, ow), target = y.shape, Matrix.image(y)
        rest = ending.rest or target
        share = blocks(blocks(columns, config["programs"]), config["n"]) * config["n"]
        block_s = power(stage.outputs, LEAST_DEPTH) if with_last else min(config["n"], power(stage.outputs))
        across = blocks(columns, share) if with_last else blocks(stage.outputs, block_s)
        conv_int8_kernel[blocks(n * oh * ow, config["m"]), across](
            x=x,
            core=core.rows,
            last=last.rows,
            scale_core=core.scale,
            scale_last=last.scale,
            shift_core=core.shift,
            shift_last=last.shift,
            y=y,
            rows=n * oh * ow,
            rank_r=stage.inputs,
            rank_s=stage.outputs,
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
            core_step=core.rows.stride(0),
            tap_step=core.rows.stride(1),
            last_step=last.rows.stride(0),
            rest_outer=rest.outer,
            rest_step=rest.step,
            rest_column=rest.column,
            y_outer=target.outer,
            y_step=target.step,
            y_column=target.column,
            x_inverse=inverse_of(grid),
            x_zero=zero_of(grid),
            level_core=levels[self.core][0],
            h_inverse=levels[self.core][1],
            h_zero=zero_of(after),
            level_last=levels[self.core + with_last][0],
            taps=stage.kernel[0] * stage.kernel[1],
            taps_wide=stage.kernel[1],
            stride_h=stage.stride[0],
            stride_w=stage.stride[1],
            pad_h=stage.before[0],
            pad_w=stage.before[1],
            dilation_h=stage.dilation[0],
            dilation_w=stage.dilation[1],
            block_m=config["m"],
            block_r=max(config["k"], LEAST_DEPTH),
            block_s=block_s,
            block_n=config["n"],
            reads=way_of(x, grid),
            with_last=with_last,
            h_by_row=with_last and not after,
            **ending.arguments(target),
            num_warps=config["warps"],
            num_stages=config["stages"],
            enable_fp_fusion=False,
        )

    def candidates(self) -> list[Config]:
        """Configurations worth timing, the default first."""
        stage, after = self.factors[self.core][0], self.core + 1 < len(self.factors)
        positions = self.y.numel() // self.y.shape[1]
        lasts = [1, 0] if after and stage.outputs <= LARGEST_RANK else [0]
        return [
            {
                "last": last,
                "programs": programs,
                **dict(zip(("m", "k", "n", "warps", "stages"), shape, strict=True)),
            }
            for last in lasts
            for programs in ((1, 4) if last else (1,))
            for shape in _SHAPES
            if shape[0] <= 2 * power(positions)
            and not (last and stage.outputs > LARGEST_RANK // 2 and shape[3] < 8)
        ]


_SHAPES = (
    (64, 64, 64, 4, 2), (64, 64, 64, 8, 2), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 128, 8, 3),
    (32, 64, 64, 4, 4), (16, 128, 64, 8, 3),
)  # fmt: skip
