"""The Triton kernel of a convolution between two 1x1 ones, each of which it makes or leaves to others."""

from __future__ import annotations

import triton.language as tl

from tdpass.kernels.gpu.language import finish, jit, product


@jit
def conv_kernel(
    x: tl.tensor,
    first: tl.tensor,
    core: tl.tensor,
    last: tl.tensor,
    bias: tl.tensor,
    rest: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    rank_r: tl.tensor,
    rank_s: tl.tensor,
    columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    share: tl.tensor,
    x_image: tl.tensor,
    x_row: tl.tensor,
    x_step: tl.tensor,
    x_column: tl.tensor,
    first_step: tl.tensor,
    core_step: tl.tensor,
    tap_step: tl.tensor,
    last_step: tl.tensor,
    rest_outer: tl.tensor,
    rest_step: tl.tensor,
    rest_column: tl.tensor,
    y_outer: tl.tensor,
    y_step: tl.tensor,
    y_column: tl.tensor,
    taps: tl.constexpr,
    taps_wide: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    pad_h: tl.constexpr,
    pad_w: tl.constexpr,
    dilation_h: tl.constexpr,
    dilation_w: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    block_s: tl.constexpr,
    with_first: tl.constexpr,
    with_last: tl.constexpr,
    activation: tl.constexpr,
    biased: tl.constexpr,
    rested: tl.constexpr,
    compute: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """`block_m` output positions, of all channels of the core or of `block_s` of them.

    With all channels it makes columns `program_id(1) * share` on.

    x is the image, or with no first stage here what that made of it, `rank_r` channels; `core[s, tap, r]`.
    """
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    image, spot = m // (out_height * out_width), m % (out_height * out_width)
    top, left = spot // out_width * stride_h - pad_h, spot % out_width * stride_w - pad_w
    s = tl.arange(0, block_s)
    if not with_last:
        s += tl.program_id(1) * block_s
    core_rows, in_s = core + s.to(tl.int64)[None, :] * core_step, s[None, :] < rank_s
    total = tl.zeros((block_m, block_s), tl.float32)
    steps = tl.cdiv(rank_r, block_r)
    for step in range(taps * steps):  # one loop, so that loads run ahead from tap to tap
        tap, r = step // steps, step % steps * block_r + tl.arange(0, block_r)
        h, w = top + tap // taps_wide * dilation_h, left + tap % taps_wide * dilation_w
        inside = (m < rows) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixel = (x + image.to(tl.int64) * x_image + h.to(tl.int64) * x_row + w.to(tl.int64) * x_step)[:, None]
        if with_first:
            made = tl.zeros((block_m, block_r), tl.float32)
            for start in range(0, channels, block_k):
                c = start + tl.arange(0, block_k)
                a = tl.load(
                    pixel + c[None, :] * x_column, mask=inside[:, None] & (c[None, :] < channels), other=0.0
                )
                b = tl.load(
                    first + r[None, :] * first_step + c[:, None],
                    mask=(r[None, :] < rank_r) & (c[:, None] < channels),
                    other=0.0,
                )
                made = product(a, b, made, compute, precision)
            seen = made.to(compute)
        else:
            seen = tl.load(
                pixel + r[None, :] * x_column, mask=inside[:, None] & (r[None, :] < rank_r), other=0.0
            )
        b = tl.load(core_rows + tap * tap_step + r[:, None], mask=in_s & (r[:, None] < rank_r), other=0.0)
        total = product(seen, b, total, compute, precision)
    there = image.to(tl.int64)[:, None] * y_outer + spot.to(tl.int64)[:, None] * y_step
    near = image.to(tl.int64)[:, None] * rest_outer + spot.to(tl.int64)[:, None] * rest_step
    if with_last:
        core_tile = total.to(compute)
        begin = tl.program_id(1) * share
        for start in range(begin, tl.minimum(begin + share, columns), block_n):
            n = start + tl.arange(0, block_n)
            b = tl.load(
                last + n.to(tl.int64)[None, :] * last_step + s[:, None],
                mask=(n[None, :] < columns) & (s[:, None] < rank_s),
                other=0.0,
            )
            out = product(core_tile, b, tl.zeros((block_m, block_n), tl.float32), compute, precision)
            mask = (m[:, None] < rows) & (n[None, :] < columns)
            out = finish(
                out,
                bias,
                rest + near + n[None, :] * rest_column,
                n[None, :],
                n[None, :] < columns,
                mask,
                activation,
                biased,
                rested,
            )
            tl.store(y + there + n[None, :] * y_column, out.to(y.dtype.element_ty), mask=mask)
    else:
        mask = (m[:, None] < rows) & in_s
        total = finish(
            total,
            bias,
            rest + near + s[None, :] * rest_column,
            s[None, :],
            in_s,
            mask,
            activation,
            biased,
            rested,
        )
        tl.store(y + there + s[None, :] * y_column, total.to(y.dtype.element_ty), mask=mask)
