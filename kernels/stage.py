"""One convolution of a fused chain, and how its weight is laid out for the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Lanes = Literal["channels", "pixels"]
Pair = tuple[int, int]

PANEL: dict[Lanes, int] = {"channels": 16, "pixels": 8}
_INTEGERS = 13


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
        return [self.inputs, self.outputs, self.groups, *self.kernel, *self.stride, *self.before, *self.after, *self.dilation]

    def packed_shape(self, lanes: Lanes) -> tuple[int, ...]:
        """Shape of the packed weight."""
        width, taps = PANEL[lanes], math.prod(self.kernel)
        if lanes == "channels" and self.depthwise:
            return (-(-self.outputs // width), taps, width)
        panels, depth = -(-self.outputs // self.groups // width), self.inputs // self.groups
        return (self.groups, panels, *((taps, depth) if lanes == "channels" else (depth, taps)), width)

    def pack(self, weight: Tensor, lanes: Lanes) -> Tensor:
        """`weight[o, i / groups, h, w]` in panels of output channels, missing ones zero; float32.

        Channel lanes: `[groups, panels, h w, i / groups, 16]`, a depthwise stage `[panels, h w, 16]`; pixel lanes:
        `[groups, panels, i / groups, h w, 8]`.
        """
        width = PANEL[lanes]
        if lanes == "channels" and self.depthwise:
            flat = weight.float().reshape(self.outputs, -1)
            return F.pad(flat, (0, 0, 0, -self.outputs % width)).reshape(-1, width, flat.shape[1]).transpose(1, 2).contiguous()
        per_group = weight.float().reshape(self.groups, self.outputs // self.groups, self.inputs // self.groups, -1)
        padded = F.pad(per_group, (0, 0, 0, 0, 0, -per_group.shape[1] % width))
        panels = padded.reshape(self.groups, -1, width, *per_group.shape[2:])
        return panels.permute((0, 1, 4, 3, 2) if lanes == "channels" else (0, 1, 3, 4, 2)).contiguous()

    def unpack(self, packed: Tensor, lanes: Lanes) -> Tensor:
        """The inverse of `pack`."""
        if lanes == "channels" and self.depthwise:
            return packed.transpose(1, 2).flatten(0, 1)[: self.outputs].reshape(self.shape)
        panels = packed.permute((0, 1, 4, 3, 2) if lanes == "channels" else (0, 1, 4, 2, 3))
        return panels.flatten(1, 2)[:, : self.outputs // self.groups].reshape(self.shape)


def stages_of(integers: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a flat list of integers."""
    found = []
    for start in range(0, len(integers), _INTEGERS):
        i, o, g, kh, kw, sh, sw, bh, bw, ah, aw, dh, dw = integers[start : start + _INTEGERS]
        found.append(Stage(i, o, g, (kh, kw), (sh, sw), (bh, bw), (ah, aw), (dh, dw)))
    return tuple(found)
