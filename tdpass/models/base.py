"""What the passes need of a model, whichever front end it came through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import UsageError
from tdpass.formats.base import Layer
from tdpass.site import Extent, Site
from tdpass.tape import Tape


@dataclass(frozen=True)
class Batch:
    """One call of a model: positional and named tensors.

    `axes` says along which axis of each of `tensors` the samples lie, None for one that all of them share; a call of which
    no tensor has one is a single sample.  Where `axes` is not given the samples lie along the first axis, of all tensors that
    are as long there as the first tensor that has one.
    """

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    axes: tuple[int | None, ...] | None = None

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
        return next((int(tensor.shape[axis]) for tensor, axis in zip(self.tensors, self.sample_axes, strict=True) if axis is not None), 1)

    @property
    def divisible(self) -> bool:
        """Whether the call can be cut into its samples."""
        return any(axis is not None for axis in self.sample_axes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same call with every tensor changed, axes as they are."""
        return self.replaced([change(tensor) for tensor in self.tensors])

    def replaced(self, tensors: Sequence[Tensor]) -> Batch:
        """The same call with these for `tensors`, axes as they are."""
        count = len(self.args)
        return Batch(tuple(tensors[:count]), dict(zip(self.kwargs, tensors[count:], strict=True)), self.axes)

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` up to `stop`; the whole call where it cannot be cut."""

        def cut(tensor: Tensor, axis: int | None) -> Tensor:
            return tensor if axis is None else tensor.narrow(axis, start, min(stop, tensor.shape[axis]) - start)

        parts = [cut(tensor, axis) for tensor, axis in zip(self.tensors, self.sample_axes, strict=True)]
        return replace(self.replaced(parts), axes=self.sample_axes)

    def resized(self, size: int) -> Batch:
        """The call cut or repeated to `size` samples; raises `UsageError` for another size where it cannot be cut."""
        if size == self.size:
            return self.map(Tensor.contiguous)
        if not self.divisible or self.size == 0:
            raise UsageError(f"the model takes its inputs as they are, {self.size} at a time, and cannot be called with {size} samples")

        def fit(tensor: Tensor, axis: int | None) -> Tensor:
            if axis is None:
                return tensor
            return torch.cat([tensor] * -(-size // self.size), axis).narrow(axis, 0, size).contiguous()

        fitted = [fit(tensor, axis) for tensor, axis in zip(self.tensors, self.sample_axes, strict=True)]
        return replace(self.replaced(fitted), axes=self.sample_axes)


class Model(Protocol):
    """A network whose weights can be read, replaced and observed; the front ends implement it.

    A site's name is stable for the life of the model; `sites()` lists dense and replaced ones alike.
    `frontend` is its kind as text, `suffix` that of the file it is saved to.
    """

    frontend: str
    suffix: str

    def sites(self) -> Sequence[Site]:
        """Every replaceable weight, in the order of first use where known; with extents once `observe` has run."""

    def declined(self) -> Mapping[str, str]:
        """Other layers that hold weights, each with the reason why it is left alone."""

    def weight(self, name: str) -> Tensor:
        """The dense weight of a site as `[o, i, *kernel]` on the CPU, in its own floating-point type; still there after `replace`."""

    def bias(self, name: str) -> Tensor | None:
        """The bias of a site's dense layer as `[o]`; still there after `replace`."""

    def layer(self, name: str) -> Layer | None:
        """What replaced the site's dense layer, with current factors; None while it is dense."""

    def replace(self, name: str, layer: Layer) -> None:
        """Put a factored layer at every use of the site; may be called again to change it.

        `layer.bias` replaces the site's bias.  Raises `PlanError` for an unknown site or a shape that does not fit.
        """

    def record(self, batch: Batch) -> Tape:
        """Run the model on a batch and record it; calls of sites that are still dense carry their names."""

    def observe(self, batch: Batch) -> None:
        """Fill in the sites' extents from one run."""

    def run(self, batch: Batch) -> object:
        """Outputs on a batch, as tensors in the model's own structure (ONNX: a dict by output name)."""

    def fold_batchnorm(self) -> Sequence[str]:
        """Fold every batch-norm that directly follows a site's only use into that site; returns the sites changed."""

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        """Estimate all running statistics anew; returns how to undo that, or None where there is no batch-norm left."""

    def fuse(self, note: Callable[[str], None], decline: Callable[[str, str], None], samples: Batch | None = None) -> bool:
        """Make one operator of each chain of layers that is faster so, timed on `samples`, else on the example; whether anything changed.

        What changes is how the model runs, not what it computes, how its tensors are named or what `layer` answers.  `note` takes
        a line about the whole, `decline` a layer and why it is left alone.
        """

    def example(self) -> Batch | None:
        """Inputs the model can be run on, where it is known of itself (or from `observe`) what it takes."""

    def fixed_batch(self) -> int | None:
        """The one number of samples it takes, where that is fixed."""

    def macs(self) -> int:
        """Multiply-adds per sample of all linear and convolution layers, as last observed dense; 0 where never observed."""

    def params(self) -> int:
        """Stored numbers in all parameters, shared ones once; buffers such as running means not counted."""

    def bytes(self) -> int:
        """Bytes of all parameters."""

    def clone(self) -> Self:
        """An independent copy."""

    def check(self) -> None:
        """Raise `InvalidModelError` if the model is inconsistent."""

    def unwrap(self) -> object:
        """The model as the type that came in."""

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the deployable file of this front end, atomically, with `metadata` inside; raises `UsageError` for a wrong suffix."""


def with_extents(site: Site, tape: Tape) -> Site:
    """The site with the activation sizes that a recorded run shows, per sample."""
    extents: list[Extent] = []
    for index in tape.site_calls.get(site.name, ()):
        before, after = tape.calls[index].shapes
        if site.kind == "linear":
            positions = math.prod(before[:-1]) // tape.batch_size
            extents.append(((positions,), (positions,)))
        else:
            extents.append((before[2:], after[2:]))
    return replace(site, extents=tuple(extents))


def call_batch(model: Model, batches: Sequence[Batch], size: int) -> Batch:
    """A call of `size` samples: from the data, else from the model's example.

    Raises `UsageError` where there is neither, or the model takes another number of samples.
    """
    fixed = model.fixed_batch()
    if fixed not in (None, size):
        raise UsageError(f"the model takes exactly {fixed} samples at a time and cannot be timed with {size}; pass batch={fixed} (--batch {fixed})")
    example = batches[0] if batches else model.example()
    if example is None:
        raise UsageError("planning on measured time needs to see the model running; pass data= or example_inputs=")
    return example.resized(size)
