"""What kinds with spatial axes share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdpass.errors import UnsupportedError
from tdpass.kinds.base import Attributes, LayerKind, Sizes, Window, some_rows
from tdpass.site import Extent, Pads, Site

Convolving = nn.modules.conv._ConvNd


class Spatial(LayerKind):
    """`x[n, i, *size]` and `y[n, o, *size]`, each extent that of one image."""

    axes = range(1, 4)

    def site_of(self, module: Convolving, name: str, padding: Pads) -> Site:
        """The site of a module that pads so."""
        weight = module.weight
        return Site(
            name, self.name, tuple(self.turned(weight, module.groups).shape), tuple(module.stride), padding,
            tuple(module.dilation),
            module.bias is not None, weight.element_size(), groups=module.groups,
        )  # fmt: skip

    def build(self, cls: type[nn.Module], shape: Sizes, options: Mapping[str, Any]) -> nn.Module:
        axes, groups = len(shape) - 2, int(options.get("groups", 1))
        given = {
            name: value if isinstance(value, str) else _expanded(value, axes)
            for name, value in options.items()
            if name != "groups"
        }
        outputs, inputs = self.channels(shape, groups)
        return cls(inputs, outputs, shape[2:], bias=False, groups=groups, device="meta", **given)

    def channels(self, shape: Sizes, groups: int) -> tuple[int, int]:
        """Outputs and inputs of a stored weight of that shape."""
        return shape[0], shape[1] * groups

    def window(self, attributes: Attributes, shape: Sizes, size: Sequence[int | None]) -> Window:
        axes = len(shape) - 2
        if axes not in self.axes:
            raise UnsupportedError(f"a convolution of {axes} spatial axes is not supported")
        stride = tuple(attributes.get_ints("strides", (1,) * axes))
        dilation = tuple(attributes.get_ints("dilations", (1,) * axes))
        plain = Window(stride, (), dilation, attributes.get_int("group", 1))
        return Window(stride, self.pads(attributes, plain, shape[2:], size), dilation, plain.groups)

    def pads(self, attributes: Attributes, window: Window, kernel: Sizes, size: Sequence[int | None]) -> Pads:
        """The padding of a node; raises `UnsupportedError` with the reason where that is not to be had."""
        raise NotImplementedError

    def call(self, site: Site, read: Sizes, made: Sizes) -> tuple[Extent, int]:
        axes = site.axes
        return (read[-axes:], made[-axes:]), math.prod(
            read[: -axes - 1]
        )  # without an axis of images there is one

    def sample(self, site: Site, batch: int) -> Sizes:
        ((read, _), *_) = site.extents
        return (batch, site.i, *read)

    def output_rows(self, y: Tensor, site: Site) -> Tensor:
        y = with_samples(y, site)
        return y.movedim(1, -1).reshape(-1, y.shape[1])


def with_samples(x: Tensor, site: Site) -> Tensor:
    """What a layer reads or makes, with an axis of samples."""
    return x if site.channel_axis(x.dim()) else x.unsqueeze(0)


def windows(x: Tensor, site: Site, stride: Sequence[int]) -> Tensor:
    """What an already padded input shows at every position: a view `[n, *positions, i, *kernel]`."""
    geometry = zip(site.kernel, stride, site.dilation, strict=True)
    for axis, (taps, step, dilation) in enumerate(geometry, start=2):
        x = x.unfold(axis, dilation * (taps - 1) + 1, step)[..., ::dilation]
    axes = site.axes
    return x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))


def some_windows(seen: Tensor, site: Site, limit: int | None, generator: torch.Generator | None) -> Tensor:
    """`[rows, i, *kernel]` of at most `limit` windows, gathered without copying the rest.

    All of them where there are no more.
    """
    positions = seen.shape[: 1 + site.axes]
    chosen = some_rows(math.prod(positions), limit, generator)
    return seen.flatten(0, site.axes) if chosen is None else seen[torch.unravel_index(chosen, positions)]


def _expanded(value: Any, axes: int) -> Sizes:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
