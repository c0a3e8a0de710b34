"""Other data of the same kind: inputs with the moments of given ones."""

from __future__ import annotations

import torch
from torch import Tensor

from tdpass.models.base import Batch

_FEW_SAMPLES = 8


def resampled(call: Batch, generator: torch.Generator) -> Batch:
    """A call of the same shapes with other numbers of the same moments.

    Floating-point inputs become normal noise with the mean and deviation of each channel (the first axis that
    is not the samples'), within the range of the values that were there.  Whole numbers, which may be tokens,
    masks or indices, and floating-point inputs that hold nothing else are the values that were there in
    another order.
    """
    return call.replaced(
        [_other(tensor, axis, generator) for tensor, axis in zip(call.tensors, call.sample_axes, strict=True)]
    )


def _other(tensor: Tensor, samples: int | None, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or bool((tensor == tensor.round()).all()):
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order].reshape(tensor.shape)
    deviation, mean = torch.std_mean(
        tensor.double(), dim=_within(tensor, samples), keepdim=True, correction=0
    )
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * deviation + mean
    return noise.to(tensor.dtype).clamp(tensor.min(), tensor.max())


def _within(tensor: Tensor, samples: int | None) -> list[int]:
    """The axes over which a channel's moments are taken.

    All where a channel has too few values to have any.
    """
    axes = list(range(tensor.dim()))
    channel = next((axis for axis in axes if axis != samples), None)
    rest = [axis for axis in axes if axis != channel]
    values = torch.Size(tensor.shape[axis] for axis in rest).numel()
    return axes if channel is None or values < _FEW_SAMPLES else rest
