"""conv_transpose: what a convolution of that stride would have read, from what it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.kinds.base import TYPICAL, Attributes, Functions, Sizes, Window, register_kind
from tdpass.kinds.pads import transposed_pads
from tdpass.kinds.spatial import Spatial, some_windows, windows, with_samples
from tdpass.ops import Ops, V, swapped_channels, transposed_convolution
from tdpass.site import Extent, Pads, Site

_ATEN = torch.ops.aten


@register_kind
class TransposedConvolution(Spatial):
    """`y[n, o, q] = sum_ik W[o, i, k] x[n, i, p]` over all `stride p + dilation k - before = q`.

    The padding of a site is what is left out of the whole sum, (before, after) per axis; an output padding
    counts against `after`. Models store the weight as `[i, o / groups, *kernel]`.
    """

    name = "conv_transpose"
    modules = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    functions: ClassVar[Functions] = {
        torch.conv_transpose1d: nn.ConvTranspose1d, torch.conv_transpose2d: nn.ConvTranspose2d,
        torch.conv_transpose3d: nn.ConvTranspose3d,
        _ATEN.conv_transpose1d.default: nn.ConvTranspose1d, _ATEN.conv_transpose2d.input: nn.ConvTranspose2d,
        _ATEN.conv_transpose3d.input: nn.ConvTranspose3d,
    }  # fmt: skip
    arguments: ClassVar[Mapping[str, Any]] = {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "output_padding": 0,
        "groups": 1,
        "dilation": 1,
    }
    calls = frozenset(
        {
            torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
            F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, transposed_convolution,
        }
    )  # fmt: skip
    operator = "ConvTranspose"
    as_stored = False

    def examples(self) -> Sequence[Site]:
        return (
            _seen("transposed2d", (12, 16, 3, 3), (5, 4), stride=2, cut=(1, 0)),
            _seen("transposed2d_dilated", (8, 12, 3, 3), (4, 4), dilation=2, cut=(2, 3)),
            _seen("transposed2d_beyond", (16, 12, 3, 3), (4, 3), stride=2, cut=(0, -1)),
            _seen("transposed1d", (16, 12, 5), (7,), stride=3, cut=(2, 1)),
            _seen("transposed3d", (8, 6, 3, 3, 3), (3, 2, 3), stride=2, cut=(1, 1)),
            _seen("transposed_grouped", (12, 6, 3, 3), (4, 3), stride=2, cut=(1, 1), groups=2),
        )

    def site(self, module: nn.Module, name: str) -> Site:
        assert isinstance(module, self.modules)
        padding = [int(size) for size in module.padding]
        return self.site_of(
            module,
            name,
            tuple((size, size - extra) for size, extra in zip(padding, module.output_padding, strict=True)),
        )

    def channels(self, shape: Sizes, groups: int) -> tuple[int, int]:
        return shape[1] * groups, shape[0]

    def turned(self, weight: Tensor, groups: int) -> Tensor:
        return swapped_channels(weight, groups)

    def pads(self, attributes: Attributes, window: Window, kernel: Sizes, size: Sequence[int | None]) -> Pads:
        return transposed_pads(attributes, size, kernel, window.stride, window.dilation)

    def input_sizes(self, module: nn.Module, positions: int) -> Sequence[Sizes]:
        assert isinstance(module, self.modules)
        return ((2, module.in_channels, *(positions for _ in module.kernel_size)),)

    def typical(self, site: Site) -> Extent:
        return (TYPICAL,) * site.axes, tuple(TYPICAL * step for step in site.stride)

    def positions(self, site: Site, axes: range | None = None) -> int:
        return site.positions_after(0 if axes is None else axes.start)

    def apply(self, ops: Ops[V], x: V, weight: V, bias: V | None, site: Site) -> V:
        return ops.conv_transpose(x, weight, bias, site.stride, site.padding, site.dilation, site.groups)

    def reaches(self, site: Site) -> None:
        return None

    def rows(
        self, x: Tensor, site: Site, limit: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Of a plain convolution with the kernel turned round, over the input with zeros in between."""
        x = with_samples(x, site)
        spread = x.new_zeros(
            *x.shape[:2],
            *(stride * (size - 1) + 1 for size, stride in zip(x.shape[2:], site.stride, strict=True)),
        )
        places: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in site.stride))
        spread[places] = x
        reach = [dilation * (taps - 1) for taps, dilation in zip(site.kernel, site.dilation, strict=True)]
        sides = zip(reach, site.padding, strict=True)
        pads = [(most - before, most - after) for most, (before, after) in sides]
        padded = F.pad(spread, [side for pair in reversed(pads) for side in pair])
        found = some_windows(windows(padded, site, (1,) * site.axes), site, limit, generator)
        return found.flip(tuple(range(2, 2 + site.axes))).flatten(1)


def _seen(
    name: str,
    shape: Sizes,
    size: Sizes,
    stride: int = 1,
    cut: tuple[int, int] = (0, 0),
    dilation: int = 1,
    groups: int = 1,
) -> Site:
    """A site that was seen on one image of that size."""
    axes = len(size)
    made = tuple(
        stride * (n - 1) + dilation * (k - 1) + 1 - sum(cut) for n, k in zip(size, shape[2:], strict=True)
    )
    window = (stride,) * axes, (cut,) * axes, (dilation,) * axes
    return Site(name, TransposedConvolution.name, shape, *window, extents=((size, made),), groups=groups)
