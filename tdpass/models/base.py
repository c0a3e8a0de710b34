"""What the passes need of a model, whichever front end it came through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from typing_extensions import Self

from tdpass.errors import UsageError
from tdpass.formats.base import Layer
from tdpass.models.batch import Batch as Batch  # noqa: PLC0414 - part of the protocol
from tdpass.models.signature import Signature
from tdpass.products import Counted
from tdpass.site import Site
from tdpass.tape import Tape


def no_reasons(name: str, reason: str) -> None:
    """Does nothing with why something was declined."""


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

    def observe(self, *batches: Batch) -> None:
        """Fill in the sites' extents and the multiply-adds from a run on the first call, on all where it shows that they may differ."""

    def run(self, batch: Batch) -> object:
        """Outputs on a batch, as tensors in the model's own structure (ONNX: a dict by output name)."""

    def fold_batchnorm(self, decline: Callable[[str, str], None] = no_reasons) -> Sequence[str]:
        """Fold every batch-norm that directly follows a site's only use into that site; returns the sites changed.

        `decline` takes a batch-norm that follows a site, and why it stays.
        """

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        """Estimate all running statistics anew; returns how to undo that, or None where there is no batch-norm left."""

    def fuse(self, note: Callable[[str], None], decline: Callable[[str, str], None], samples: Batch | None = None) -> bool:
        """Make one operator of each chain of layers that is faster so, timed on `samples`, else on the example; whether anything changed.

        What changes is how the model runs, not what it computes, how its tensors are named or what `layer` answers.  `note` takes
        a line about the whole, `decline` a layer and why it is left alone.
        """

    def example(self) -> Batch | None:
        """Inputs the model can be run on, where it is known of itself (or from `observe`) what it takes."""

    def signature(self) -> Signature:
        """What it says of the inputs that it takes."""

    def fixed_batch(self) -> int | None:
        """The one number of samples it takes, where that is fixed."""

    def count(self, batch: Batch | None = None) -> Counted:
        """Multiply-adds of everything that runs when the model, as it is now, is called: layers, attention and recurrence alike.

        By default with what was last observed; where that is nothing, none are counted.
        """

    def macs(self) -> int:
        """Multiply-adds per sample as last observed; 0 where never observed."""

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


def call_batch(model: Model, batches: Sequence[Batch], size: int) -> Batch:
    """A call of `size` samples: from the data, else from the model's example.

    Raises `UsageError` where there is neither, or the model takes another number of samples.
    """
    fixed = model.fixed_batch()
    if fixed not in (None, size):
        raise UsageError(f"the model takes exactly {fixed} samples at a time and cannot be timed with {size}; pass batch={fixed} (--batch {fixed})")
    example = batches[0] if batches else model.example()
    if example is None:
        raise UsageError("planning on measured time needs to see the model running; pass data= or example_inputs= (--data, --input)")
    return example.resized(size)
