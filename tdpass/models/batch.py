"""The inputs of one call of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tdpass.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """One call of a model: positional and named tensors.

    `axes` says along which axis of each of `tensors` the samples lie, None for one that all of them share; a
    call of which no tensor has one is a single sample.  Where `axes` is not given the samples lie along the
    first axis, of all tensors that are as long there as the first tensor that has one.
    """

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    axes: tuple[int | None, ...] | None = None
    whole: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All inputs, positional ones first."""
        return (*self.args, *self.kwargs.values())

    @property
    def sample_axes(self) -> tuple[int | None, ...]:
        """The axis of the samples of each of `tensors`, None for one that all share."""
        if self.axes is not None:
            return self.axes
        length = next((tensor.shape[0] for tensor in self.tensors if tensor.dim()), None)
        return tuple(0 if tensor.dim() and tensor.shape[0] == length else None for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Number of samples."""
        return next(
            (
                int(tensor.shape[axis])
                for tensor, axis in zip(self.tensors, self.sample_axes, strict=True)
                if axis is not None
            ),
            1,
        )

    @property
    def divisible(self) -> bool:
        """Whether the call can be cut into its samples."""
        return not self.whole and any(axis is not None for axis in self.sample_axes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same call with every tensor changed, axes as they are."""
        return self.replaced([change(tensor) for tensor in self.tensors])

    def replaced(self, tensors: Sequence[Tensor]) -> Batch:
        """The same call with these for `tensors`, axes as they are."""
        count = len(self.args)
        return Batch(
            tuple(tensors[:count]),
            dict(zip(self.kwargs, tensors[count:], strict=True)),
            self.axes,
            self.whole,
        )

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` up to `stop`; the whole call where it cannot be cut."""
        if not self.divisible:
            return self

        def cut(tensor: Tensor, axis: int | None) -> Tensor:
            return (
                tensor if axis is None else tensor.narrow(axis, start, min(stop, tensor.shape[axis]) - start)
            )

        parts = [cut(tensor, axis) for tensor, axis in zip(self.tensors, self.sample_axes, strict=True)]
        return replace(self.replaced(parts), axes=self.sample_axes)

    def resized(self, size: int) -> Batch:
        """The call cut or repeated to `size` samples.

        Raises `UsageError` for another size where it cannot be cut.
        """
        if size == self.size:
            return self.map(Tensor.contiguous)
        if not self.divisible or self.size == 0:
            raise UsageError(
                f"the model takes its inputs as they are, {self.size} at a time, and cannot be called with "
                f"{size} samples"
            )

        def fit(tensor: Tensor, axis: int | None) -> Tensor:
            if axis is None:
                return tensor
            return torch.cat([tensor] * -(-size // self.size), axis).narrow(axis, 0, size).contiguous()

        fitted = [fit(tensor, axis) for tensor, axis in zip(self.tensors, self.sample_axes, strict=True)]
        return replace(self.replaced(fitted), axes=self.sample_axes)
