"""The core of a convolution chain in whole numbers, with the 1x1 stage behind it."""

from __future__ import annotations

import triton.language as tl

from tdpass.kernels.gpu.integers import largest, leave, read, shifted, worth
from tdpass.kernels.gpu.language import jit


@jit
def conv_int8_kernel(
    x: tl.tensor, core: tl.tensor, last: tl.tensor,
    scale_core: tl.tensor, scale_last: tl.tensor, shift_core: tl.tensor, shift_last: tl.tensor,
    bias: tl.tensor, rest: tl.tensor, y: tl.tensor,
    rows: tl.tensor, rank_r: tl.tensor, rank_s: tl.tensor, columns: tl.tensor,
    height: tl.tensor, width: tl.tensor, out_height: tl.tensor, out_width: tl.tensor, share: tl.tensor,
    x_image: tl.tensor, x_row: tl.tensor, x_step: tl.tensor, x_column: tl.tensor,
    core_step: tl.tensor, tap_step: tl.tensor, last_step: tl.tensor,
    rest_outer: tl.tensor, rest_step: tl.tensor, rest_column: tl.tensor,
    y_outer: tl.tensor, y_step: tl.tensor, y_column: tl.tensor,
    x_inverse: tl.tensor, x_zero: tl.tensor, level_core: tl.tensor,
    h_inverse: tl.tensor, h_zero: tl.tensor, level_last: tl.tensor,
    rest_scale: tl.tensor, rest_zero: tl.tensor, y_inverse: tl.tensor, y_zero: tl.tensor,
    taps: tl.constexpr, taps_wide: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    pad_h: tl.constexpr, pad_w: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    block_m: tl.constexpr, block_r: tl.constexpr, block_s: tl.constexpr, block_n: tl.constexpr,
    reads: tl.constexpr, with_last: tl.constexpr, h_by_row: tl.constexpr,
    activation: tl.constexpr, biased: tl.constexpr, rested: tl.constexpr, rest_codes: tl.constexpr,
    codes: tl.constexpr,
) -> None:  # fmt: skip
    """`block_m` positions: the whole core and columns `program_id(1) * share` on, or `block_s` of the core.

    Positions beside the image read the code of zero; `core[s, tap, r]`.
    """
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    image, spot = m // (out_height * out_width), m % (out_height * out_width)
    top, left = spot // out_width * stride_h - pad_h, spot % out_width * stride_w - pad_w
    s = tl.arange(0, block_s)
    if not with_last:
        s += tl.program_id(1) * block_s
    core_rows, in_s = core + s.to(tl.int64)[None, :] * core_step, s < rank_s
    products = tl.zeros((block_m, block_s), tl.int32)
    steps = tl.cdiv(rank_r, block_r)
    for step in range(taps * steps):  # one loop, so that loads run ahead from tap to tap
        tap, r = step // steps, step % steps * block_r + tl.arange(0, block_r)
        h, w = top + tap // taps_wide * dilation_h, left + tap % taps_wide * dilation_w
        inside = (m < rows) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixel = (x + image.to(tl.int64) * x_image + h.to(tl.int64) * x_row + w.to(tl.int64) * x_step)[:, None]
        in_r = r < rank_r
        a = read(pixel + r[None, :] * x_column, inside[:, None] & in_r[None, :], x_inverse, x_zero, reads)
        a = tl.where(inside[:, None], a, tl.cast(x_zero - 128.0, tl.int8))
        b = tl.load(core_rows + tap * tap_step + r[:, None], mask=in_s[None, :] & in_r[:, None], other=0)
        products = tl.dot(a, b, products, out_dtype=tl.int32)
    hidden = worth(products, scale_core, shift_core, s, in_s, level_core)
    there = image.to(tl.int64)[:, None] * y_outer + spot.to(tl.int64)[:, None] * y_step
    near = image.to(tl.int64)[:, None] * rest_outer + spot.to(tl.int64)[:, None] * rest_step
    if with_last:
        onward = h_inverse
        if h_by_row:
            span = largest(tl.where(in_s[None, :], hidden, 0.0))
            onward = tl.div_rn(127.0, span)[:, None]
        tile = shifted(hidden * onward, h_zero)
        begin = tl.program_id(1) * share
        for start in range(begin, tl.minimum(begin + share, columns), block_n):
            n = start + tl.arange(0, block_n)
            in_n = n < columns
            b = tl.load(
                last + n.to(tl.int64)[None, :] * last_step + s[:, None],
                mask=in_n[None, :] & in_s[:, None],
                other=0,
            )
            made = tl.dot(tile, b, tl.zeros((block_m, block_n), tl.int32), out_dtype=tl.int32)
            total = worth(made, scale_last, shift_last, n, in_n, level_last)
            if h_by_row:
                total *= tl.div_rn(span, 127.0)[:, None]
            mask = (m[:, None] < rows) & in_n[None, :]
            total = leave(
                total, bias, rest + near + n[None, :] * rest_column, n[None, :], in_n[None, :], mask,
                rest_scale, rest_zero, y_inverse, y_zero, activation, biased, rested, rest_codes, codes,
            )  # fmt: skip
            tl.store(y + there + n[None, :] * y_column, total.to(y.dtype.element_ty), mask=mask)
    else:
        mask = (m[:, None] < rows) & in_s[None, :]
        hidden = leave(
            hidden, bias, rest + near + s[None, :] * rest_column, s[None, :], in_s[None, :], mask,
            rest_scale, rest_zero, y_inverse, y_zero, activation, biased, rested, rest_codes, codes,
        )  # fmt: skip
        tl.store(y + there + s[None, :] * y_column, hidden.to(y.dtype.element_ty), mask=mask)
