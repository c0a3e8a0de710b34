"""conv: a weighted sum over a window that moves over one to three spatial axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.errors import UnsupportedError
from tdpass.kinds.base import TYPICAL, Attributes, Functions, Sizes, Window, register_kind
from tdpass.kinds.pads import explicit_pads
from tdpass.kinds.spatial import Spatial, some_windows, windows, with_samples
from tdpass.ops import Ops, V, padded_convolution
from tdpass.site import Extent, Pads, Site

_ATEN = torch.ops.aten


@register_kind
class Convolution(Spatial):
    """`y[n, o, p] = sum_ik W[o, i, k] x[n, i, stride p + dilation k - before]`, zero where x has nothing.

    With groups each output sums over the inputs of its own group alone: `W[o, i / groups, *kernel]`.
    """

    name = "conv"
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    functions: ClassVar[Functions] = {
        torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d,
        _ATEN.conv1d.default: nn.Conv1d, _ATEN.conv2d.default: nn.Conv2d, _ATEN.conv3d.default: nn.Conv3d,
        _ATEN.conv1d.padding: nn.Conv1d, _ATEN.conv2d.padding: nn.Conv2d, _ATEN.conv3d.padding: nn.Conv3d,
    }  # fmt: skip
    arguments: ClassVar[Mapping[str, Any]] = {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
    }
    calls = frozenset(
        {torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d, padded_convolution}
    )
    operator = "Conv"

    def examples(self) -> Sequence[Site]:
        return (
            _seen("conv2d", (12, 16, 3, 3), (9, 7), padding=(1, 1)),
            _seen("conv2d_strided", (16, 12, 3, 3), (8, 9), stride=2, padding=(0, 1)),
            _seen("conv2d_dilated", (8, 12, 3, 3), (9, 8), padding=(2, 2), dilation=2),
            _seen("conv2d_pointwise", (12, 18, 1, 1), (5, 6)),
            _seen("conv2d_5x5", (8, 6, 5, 5), (9, 9), padding=(2, 2)),
            _seen("conv2d_1x7", (8, 12, 1, 7), (6, 9), stride=2, padding=(1, 1)),
            _seen("conv1d", (16, 12, 5), (15,), stride=2, padding=(1, 2)),
            _seen("conv3d", (8, 6, 3, 3, 3), (5, 6, 5), stride=2, padding=(1, 1)),
            _seen("grouped2d", (12, 6, 3, 3), (8, 7), stride=2, padding=(1, 1), groups=2),
            _seen("grouped1d", (12, 4, 5), (13,), padding=(1, 2), groups=3),
            _seen("depthwise2d", (8, 1, 5, 5), (9, 8), padding=(2, 2), groups=8),
            _seen("multiplied2d", (8, 1, 5, 5), (9, 8), padding=(2, 2), groups=4),
        )

    def site(self, module: nn.Module, name: str) -> Site:
        assert isinstance(module, self.modules)
        return self.site_of(module, name, _padding_of(module))

    def pads(self, attributes: Attributes, window: Window, kernel: Sizes, size: Sequence[int | None]) -> Pads:
        mode = attributes.get_string("auto_pad", "NOTSET")
        padding = explicit_pads(
            mode, attributes.get_ints("pads", ()), size, kernel, window.stride, window.dilation
        )
        if padding is None:
            raise UnsupportedError(
                f"auto_pad={mode} with a stride needs a static input size or opset 12; export with explicit pads"
            )
        if any(side < 0 for pair in padding for side in pair):
            raise UnsupportedError("negative pads are not supported")
        return padding

    def input_sizes(self, module: nn.Module, positions: int) -> Sequence[Sizes]:
        assert isinstance(module, self.modules)
        reach = [
            step * (taps - 1) + positions
            for taps, step in zip(module.kernel_size, module.dilation, strict=True)
        ]
        return ((2, module.in_channels, *reach),)

    def typical(self, site: Site) -> Extent:
        return tuple(TYPICAL * step for step in site.stride), (TYPICAL,) * site.axes

    def positions(self, site: Site, axes: range | None = None) -> int:
        return site.positions_after(site.axes if axes is None else axes.stop)

    def apply(self, ops: Ops[V], x: V, weight: V, bias: V | None, site: Site) -> V:
        return ops.conv(x, weight, bias, site.stride, site.padding, site.dilation, site.groups)

    def reaches(self, site: Site) -> Sequence[tuple[int, int]]:
        geometry = zip(site.kernel, site.padding, site.dilation, site.stride, strict=True)
        return [(dilation * (taps - 1) + 1 - sum(pads), stride) for taps, pads, dilation, stride in geometry]

    def rows(
        self, x: Tensor, site: Site, limit: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        x = with_samples(x, site)
        if any(before or after for before, after in site.padding):
            x = F.pad(x, [size for pair in reversed(site.padding) for size in pair])
        return some_windows(windows(x, site, site.stride), site, limit, generator).flatten(1)


def _padding_of(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Pads:
    """The zeros that the layer itself pads with: none where it pads by another rule."""
    axes = len(module.kernel_size)
    if module.padding_mode != "zeros" or module.padding == "valid":
        return ((0, 0),) * axes
    if module.padding == "same":
        flat = module._reversed_padding_repeated_twice
        return tuple((flat[2 * axis], flat[2 * axis + 1]) for axis in reversed(range(axes)))
    return tuple((int(size), int(size)) for size in module.padding)


def _seen(
    name: str,
    shape: Sizes,
    size: Sizes,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
    groups: int = 1,
) -> Site:
    """A site that was seen on one image of that size."""
    axes = len(size)
    made = tuple(
        (n + sum(padding) - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip(size, shape[2:], strict=True)
    )
    window = (stride,) * axes, (padding,) * axes, (dilation,) * axes
    return Site(name, Convolution.name, shape, *window, extents=((size, made),), groups=groups)
