"""Padding as ONNX nodes and torch modules say it, as (before, after) per spatial axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tdpass.errors import UnsupportedError
from tdpass.kinds.base import Attributes
from tdpass.site import Pads


def flat_pads(pads: Sequence[int], axes: int) -> Pads:
    """Of `[before, ..., after, ...]`; none where the list is empty."""
    flat = list(pads) or [0] * (2 * axes)
    return tuple(zip(flat[:axes], flat[axes:], strict=True))


def explicit_pads(
    mode: str,
    pads: Sequence[int],
    size: Sequence[int | None],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Pads | None:
    """Of a convolution or pooling with any `auto_pad` mode.

    None where it needs an input size that is unknown.
    """
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


def transposed_pads(
    attributes: Attributes,
    size: Sequence[int | None],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Pads:
    """Of a transposed convolution: what is left out of its whole sum, less its output padding at the end.

    Raises `UnsupportedError` where an output shape needs an input size that is unknown, or ONNX leaves open
    what is meant.
    """
    axes = len(kernel)
    mode, wanted = attributes.get_string("auto_pad", "NOTSET"), attributes.get_ints("output_shape", ())
    extra = attributes.get_ints("output_padding", ()) or (0,) * axes
    if not wanted and mode in ("", "NOTSET", "VALID"):
        flat = flat_pads(() if mode == "VALID" else attributes.get_ints("pads", ()), axes)
        return tuple((before, after - more) for (before, after), more in zip(flat, extra, strict=True))
    if wanted and None in size:
        raise UnsupportedError("output_shape needs a static input size; export with explicit pads")
    found = []
    for axis, (k, s, d, more) in enumerate(zip(kernel, stride, dilation, extra, strict=True)):
        reach = (k - 1) * d + 1
        total = (
            reach + more - s
            if not wanted
            else s * ((size[axis] or 0) - 1) + more + reach - wanted[-axes:][axis]
        )
        if total < 0:
            raise UnsupportedError(
                f"auto_pad={mode} makes more positions than the kernel reaches; export with explicit pads"
            )
        small, large = total // 2, total - total // 2
        before, after = (small, large) if mode == "SAME_UPPER" else (large, small)
        found.append((before, after - more))
    return tuple(found)
