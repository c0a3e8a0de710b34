"""The convolutions of a chain one by one, as the library that inductor's code calls computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.kernels.stage import Stage
from tdpass.ops import padded_convolution


def plain_chain(x: Tensor, stages: Sequence[Stage], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolutions whose weights are laid out at every call; the bias is that of the last."""
    for index, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        shift = bias if index + 1 == len(stages) else None
        if stage.before == stage.after:
            x = F.conv2d(x, weight, shift, stage.stride, stage.before, stage.dilation, stage.groups)
        else:
            pads = tuple(zip(stage.before, stage.after, strict=True))
            x = padded_convolution(x, weight, shift, stage.stride, pads, stage.dilation, stage.groups)
    return x


def laid_out(stages: Sequence[Stage], weights: Sequence[Tensor], size: Sequence[int]) -> list[Tensor] | None:
    """The weights as inductor lays out constants for an input of that size; None where it does not."""
    if not torch._C._has_mkldnn or any(stage.before != stage.after for stage in stages):
        return None
    made, size = [], list(size)
    try:
        for stage, weight in zip(stages, weights, strict=True):
            made.append(torch.ops.mkldnn._reorder_convolution_weight(weight, stage.before, stage.stride, stage.dilation, stage.groups, size))
            size = [size[0], stage.outputs, *stage.output_size(size[2:])]  # type: ignore[list-item]
    except (AttributeError, RuntimeError):  # inductor's own operators: another version of torch may lack them
        return None
    return made


def frozen_chain(x: Tensor, stages: Sequence[Stage], weights: Sequence[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
    """The same with weights `laid_out` before, and relu after the last."""
    for index, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        last = index + 1 == len(stages)
        after = "relu" if relu and last else "none"
        x = torch.ops.mkldnn._convolution_pointwise(x, weight, bias if last else None, stage.before, stage.stride, stage.dilation, stage.groups, after, [], "")
    return x
