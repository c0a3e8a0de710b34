"""One convolution of a fused chain, and how its weight is laid out for the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError

Lanes = Literal["channels", "pixels", "pairs", "quads"]
Pair = tuple[int, int]

_INTEGERS = 13
_MOST_CHANNELS, _MOST_REACH = 2**24, 2**20


@dataclass(frozen=True)
class Layout:
    """How weights are packed: `width` output channels to a panel, `together` inputs beside each other.

    Taps lie outside of them or within.
    """

    width: int
    taps_outside: bool
    together: int = 1
    dtype: torch.dtype = torch.float32
    by_channel: torch.dtype = torch.float32  # of a depthwise stage

    @property
    def order(self) -> tuple[int, ...]:
        """In which order axes of `[groups, panels, width, i / groups / together, together, h w]` go."""
        return (0, 1, 5, 3, 2, 4) if self.taps_outside else (0, 1, 3, 5, 2, 4)


LAYOUTS: dict[Lanes, Layout] = {
    "channels": Layout(16, True),
    "pixels": Layout(8, False),
    "pairs": Layout(16, True, 2, torch.bfloat16),
    "quads": Layout(16, True, 4, torch.int8, torch.int8),
}


def layout_of(lanes: str) -> Layout:
    """How weights are packed for these lanes; raises `KernelError` for unknown ones."""
    for name, layout in LAYOUTS.items():
        if name == lanes:
            return layout
    raise KernelError(f"lanes {lanes!r} are not known; they are one of {', '.join(LAYOUTS)}")


@dataclass(frozen=True)
class Stage:
    """A two-dimensional convolution; a linear layer is one with a 1x1 kernel.  Pairs are (height, width)."""

    inputs: int
    outputs: int
    groups: int = 1
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved by itself."""
        return self.groups == self.inputs == self.outputs > 1

    @property
    def pointwise(self) -> bool:
        """Whether every position of the output reads one of the input."""
        return self.kernel == (1, 1) and self.before == self.after == (0, 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight, `[o, i / groups, h, w]`."""
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    def output_size(self, size: Sequence[int | torch.SymInt]) -> tuple[int | torch.SymInt, ...]:
        """Spatial size of the output for that of the input."""
        return tuple(
            (s + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for s, kernel, stride, before, after, dilation in zip(
                size, self.kernel, self.stride, self.before, self.after, self.dilation, strict=True
            )
        )

    def integers(self) -> list[int]:
        """The stage as an operator takes it."""
        return [
            self.inputs,
            self.outputs,
            self.groups,
            *self.kernel,
            *self.stride,
            *self.before,
            *self.after,
            *self.dilation,
        ]

    def packs_by_channel(self, lanes: Lanes) -> bool:
        """Whether the weight is packed as `[panels, h w, 16]`: a depthwise stage.

        It has no input channels to sum over.
        """
        return layout_of(lanes).taps_outside and self.depthwise

    def packed_dtype(self, lanes: Lanes) -> torch.dtype:
        """Type of the packed weight."""
        layout = layout_of(lanes)
        return layout.by_channel if self.packs_by_channel(lanes) else layout.dtype

    def packed_shape(self, lanes: Lanes) -> tuple[int, ...]:
        """Shape of the packed weight."""
        layout, taps = layout_of(lanes), math.prod(self.kernel)
        if self.packs_by_channel(lanes):
            return (-(-self.outputs // layout.width), taps, layout.width)
        panels, depth = (
            -(-self.outputs // self.groups // layout.width),
            -(-self.inputs // self.groups // layout.together),
        )
        sizes = (self.groups, panels, layout.width, depth, layout.together, taps)
        shape = tuple(sizes[axis] for axis in layout.order)
        return shape if layout.together > 1 else shape[:-1]

    def pack(self, weight: Tensor, lanes: Lanes) -> Tensor:
        """`weight[o, i / groups, h, w]` in panels of output channels, missing channels zero.

        Channel lanes: `[groups, panels, h w, i / groups, 16]`, a depthwise stage `[panels, h w, 16]`; pixel
        lanes: `[groups, panels, i / groups, h w, 8]`; both float32.  Pair lanes: `[groups, panels, h w, i /
        groups / 2, 16, 2]`, bfloat16.  Quad lanes: `[groups, panels, h w, i / groups / 4, 16, 4]`, int8, of
        whole numbers.
        """
        layout = layout_of(lanes)
        if self.packs_by_channel(lanes):
            flat = weight.to(layout.by_channel).reshape(self.outputs, -1)
            return (
                F.pad(flat, (0, 0, 0, -self.outputs % layout.width))
                .reshape(-1, layout.width, flat.shape[1])
                .transpose(1, 2)
                .contiguous()
            )
        per_group = weight.to(layout.dtype).reshape(
            self.groups, self.outputs // self.groups, self.inputs // self.groups, -1
        )
        padded = F.pad(
            per_group, (0, 0, 0, -per_group.shape[2] % layout.together, 0, -per_group.shape[1] % layout.width)
        )
        panels = padded.reshape(
            self.groups,
            -1,
            layout.width,
            padded.shape[2] // layout.together,
            layout.together,
            padded.shape[3],
        )
        return panels.permute(layout.order).reshape(self.packed_shape(lanes)).contiguous()

    def unpack(self, packed: Tensor, lanes: Lanes) -> Tensor:
        """The inverse of `pack`."""
        layout = layout_of(lanes)
        if self.packs_by_channel(lanes):
            return packed.transpose(1, 2).flatten(0, 1)[: self.outputs].reshape(self.shape)
        panels = packed if layout.together > 1 else packed[..., None]
        channels = (
            panels.permute([layout.order.index(axis) for axis in range(panels.dim())])
            .flatten(3, 4)
            .flatten(1, 2)
        )
        return channels[:, : self.outputs // self.groups, : self.inputs // self.groups].reshape(self.shape)


def integers_of(stages: Sequence[Stage]) -> list[int]:
    """Stages as `conv_chain` takes them; `stages_of` reads them."""
    return [value for stage in stages for value in stage.integers()]


def widths_of(stages: Sequence[Stage]) -> list[int]:
    """How many channels a chain reads, then how many each stage makes, as `linear_chain` takes them."""
    return [stages[0].inputs, *(stage.outputs for stage in stages)]


def stages_of(integers: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a flat list of integers; raises `KernelError` for a list that is none."""
    if not integers or len(integers) % _INTEGERS:
        raise KernelError(
            f"{len(integers)} integers are no stages; each has {_INTEGERS}, as `Stage.integers` gives them"
        )
    found = []
    for start in range(0, len(integers), _INTEGERS):
        i, o, g, kh, kw, sh, sw, bh, bw, ah, aw, dh, dw = integers[start : start + _INTEGERS]
        found.append(checked(Stage(i, o, g, (kh, kw), (sh, sw), (bh, bw), (ah, aw), (dh, dw))))
    return tuple(found)


def checked(stage: Stage) -> Stage:
    """The stage; raises `KernelError` for one that no convolution is."""
    bounds = {
        "channels": (1, _MOST_CHANNELS, (stage.inputs, stage.outputs, stage.groups)),
        "kernel": (1, _MOST_REACH, stage.kernel),
        "stride": (1, _MOST_REACH, stage.stride),
        "dilation": (1, _MOST_REACH, stage.dilation),
        "padding": (0, _MOST_REACH, (*stage.before, *stage.after)),
    }
    for what, (low, high, values) in bounds.items():
        if not all(low <= value <= high for value in values):
            raise KernelError(f"{what} {values} of {stage} is outside {low} to {high}")
    if stage.inputs % stage.groups or stage.outputs % stage.groups:
        raise KernelError(f"{stage.groups} groups do not divide {stage.inputs} and {stage.outputs} channels")
    return stage


@dataclass(frozen=True)
class Stages:
    """Layers in a row. `axes` counts their spatial axes, none for products with matrices."""

    stages: tuple[Stage, ...]
    axes: int

    @property
    def linear(self) -> bool:
        """Whether it is a chain of linear layers."""
        return self.axes == 0

    @property
    def integers(self) -> list[int]:
        """The stages as `conv_chain` takes them."""
        return integers_of(self.stages)

    @property
    def widths(self) -> list[int]:
        """The widths as `linear_chain` takes them."""
        return widths_of(self.stages)
