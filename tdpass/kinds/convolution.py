"""conv: a weighted sum over a window that moves over one to three spatial axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.errors import UnsupportedError
from tdpass.kinds.base import TYPICAL, Attributes, Functions, LayerKind, Sizes, Window, register_kind, some_rows
from tdpass.kinds.pads import explicit_pads
from tdpass.ops import Ops, V, padded_convolution
from tdpass.site import Extent, Pads, Site

_ATEN = torch.ops.aten


class Spatial(LayerKind):
    """What kinds with spatial axes share: `x[n, i, *size]` and `y[n, o, *size]`, and an extent per image."""

    axes = range(1, 4)

    def call(self, site: Site, read: Sizes, made: Sizes) -> tuple[Extent, int]:
        axes = site.axes
        return (read[-axes:], made[-axes:]), math.prod(read[: -axes - 1])  # without an axis of images there is one

    def sample(self, site: Site, batch: int) -> Sizes:
        ((read, _), *_) = site.extents
        return (batch, site.i, *read)

    def output_rows(self, y: Tensor, site: Site) -> Tensor:
        y = _with_samples(y, site)
        return y.movedim(1, -1).reshape(-1, y.shape[1])


@register_kind
class Convolution(Spatial):
    """`y[n, o, p] = sum_ik W[o, i, k] x[n, i, stride p + dilation k - before]`, zero where x has nothing."""

    name = "conv"
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    functions: ClassVar[Functions] = {
        torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d,
        _ATEN.conv1d.default: nn.Conv1d, _ATEN.conv2d.default: nn.Conv2d, _ATEN.conv3d.default: nn.Conv3d,
        _ATEN.conv1d.padding: nn.Conv1d, _ATEN.conv2d.padding: nn.Conv2d, _ATEN.conv3d.padding: nn.Conv3d,
    }  # fmt: skip
    arguments: ClassVar[Mapping[str, Any]] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    calls = frozenset({torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d, padded_convolution})
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
        )

    def site(self, module: nn.Module, name: str) -> Site:
        assert isinstance(module, self.modules)
        weight = module.weight
        return Site(
            name, self.name, tuple(weight.shape), tuple(module.stride), _padding_of(module), tuple(module.dilation),
            module.bias is not None, weight.element_size(),
        )  # fmt: skip

    def why_not(self, module: nn.Module) -> str | None:
        assert isinstance(module, self.modules)
        return None if module.groups == 1 else f"grouped convolutions (groups={module.groups}) are not factored"

    def build(self, cls: type[nn.Module], shape: Sizes, options: Mapping[str, Any]) -> nn.Module:
        axes, groups = len(shape) - 2, int(options.get("groups", 1))
        given = {name: value if isinstance(value, str) else _expanded(value, axes) for name, value in options.items() if name != "groups"}
        return cls(shape[1] * groups, shape[0], shape[2:], bias=False, groups=groups, device="meta", **given)

    def window(self, attributes: Attributes, shape: Sizes, size: Sequence[int | None]) -> Window:
        axes, groups = len(shape) - 2, attributes.get_int("group", 1)
        if groups != 1:
            raise UnsupportedError(f"grouped and depthwise convolutions are not supported (group={groups})")
        if axes not in self.axes:
            raise UnsupportedError(f"a convolution of {axes} spatial axes is not supported")
        stride = tuple(attributes.get_ints("strides", (1,) * axes))
        dilation = tuple(attributes.get_ints("dilations", (1,) * axes))
        mode = attributes.get_string("auto_pad", "NOTSET")
        padding = explicit_pads(mode, attributes.get_ints("pads", ()), size, shape[2:], stride, dilation)
        if padding is None:
            raise UnsupportedError(f"auto_pad={mode} with a stride needs a static input size; export with explicit pads")
        if any(side < 0 for pair in padding for side in pair):
            raise UnsupportedError("negative pads are not supported")
        return Window(stride, padding, dilation)

    def input_sizes(self, module: nn.Module, positions: int) -> Sequence[Sizes]:
        assert isinstance(module, self.modules)
        reach = [step * (taps - 1) + positions for taps, step in zip(module.kernel_size, module.dilation, strict=True)]
        return ((2, module.in_channels, *reach),)

    def typical(self, site: Site) -> Extent:
        return tuple(TYPICAL * step for step in site.stride), (TYPICAL,) * site.axes

    def positions(self, site: Site, axes: range | None = None) -> int:
        return site.positions_after(site.axes if axes is None else axes.stop)

    def apply(self, ops: Ops[V], x: V, weight: V, bias: V | None, site: Site) -> V:
        return ops.conv(x, weight, bias, site.stride, site.padding, site.dilation)

    def rows(self, x: Tensor, site: Site, limit: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        x = _with_samples(x, site)
        if any(before or after for before, after in site.padding):
            x = F.pad(x, [size for pair in reversed(site.padding) for size in pair])
        geometry = zip(site.kernel, site.stride, site.dilation, strict=True)
        for axis, (taps, stride, dilation) in enumerate(geometry, start=2):
            x = x.unfold(axis, dilation * (taps - 1) + 1, stride)[..., ::dilation]
        axes = site.axes
        windows = x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
        positions = windows.shape[: 1 + axes]
        chosen = some_rows(math.prod(positions), limit, generator)
        if chosen is not None:
            windows = windows[torch.unravel_index(chosen, positions)]
        return windows.reshape(-1, site.weights // site.o)


def _with_samples(x: Tensor, site: Site) -> Tensor:
    """What a layer reads or makes, with an axis of samples."""
    return x if site.channel_axis(x.dim()) else x.unsqueeze(0)


def _padding_of(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Pads:
    """The zeros that the layer itself pads with: none where it pads by another rule."""
    axes = len(module.kernel_size)
    if module.padding_mode != "zeros" or module.padding == "valid":
        return ((0, 0),) * axes
    if module.padding == "same":
        flat = module._reversed_padding_repeated_twice
        return tuple((flat[2 * axis], flat[2 * axis + 1]) for axis in reversed(range(axes)))
    return tuple((int(size), int(size)) for size in module.padding)


def _expanded(value: Any, axes: int) -> Sizes:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _seen(
    name: str, shape: Sizes, size: Sizes, stride: int = 1, padding: tuple[int, int] = (0, 0), dilation: int = 1
) -> Site:
    """A site that was seen on one image of that size."""
    axes = len(size)
    made = tuple((n + sum(padding) - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, shape[2:], strict=True))
    window = (stride,) * axes, (padding,) * axes, (dilation,) * axes
    return Site(name, Convolution.name, shape, *window, extents=((size, made),))
