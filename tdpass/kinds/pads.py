"""Padding as ONNX nodes and torch modules say it, as (before, after) per spatial axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tdpass.site import Pads


def flat_pads(pads: Sequence[int], axes: int) -> Pads:
    """Of `[before, ..., after, ...]`; none where the list is empty."""
    flat = list(pads) or [0] * (2 * axes)
    return tuple(zip(flat[:axes], flat[axes:], strict=True))


def explicit_pads(
    mode: str, pads: Sequence[int], size: Sequence[int | None], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pads | None:
    """Of a convolution or pooling with any `auto_pad` mode; None where it needs an input size that is unknown."""
    axes = len(kernel)
    if mode == "VALID":
        return ((0, 0),) * axes
    if mode in ("", "NOTSET"):
        return flat_pads(pads, axes)
    resolved: list[tuple[int, int]] = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        reach = (k - 1) * d + 1
        if s == 1:
            total = reach - 1
        elif n is None:
            return None
        else:
            total = max(0, (math.ceil(n / s) - 1) * s + reach - n)
        small, large = total // 2, total - total // 2
        resolved.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return tuple(resolved)
