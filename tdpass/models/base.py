"""What the passes need of a model, whichever front end it came through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from tdpass.errors import UsageError
from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.models.batch import Batch as Batch  # noqa: PLC0414 - part of the interface
from tdpass.models.signature import Signature
from tdpass.packing.size import StoredSize
from tdpass.products import Counted, counting
from tdpass.site import Site
from tdpass.tape import Tape


class Model(ABC):
    """A network whose weights can be read, replaced and observed; the front ends implement it.

    A site's name is stable for the life of the model; `sites()` lists dense and replaced ones alike.
    `frontend` is its kind as text, `suffix` that of the file it is saved to.  A front end writes what is
    abstract here; the rest follows from it, and is said anew by front ends that know more.  What only some of
    them can do is in `tdpass.models.abilities`.
    """

    frontend: ClassVar[str]
    suffix: ClassVar[str]

    @abstractmethod
    def sites(self) -> Sequence[Site]:
        """Every replaceable weight, in the order of first use where known.

        With extents once `observe` has run.
        """

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """The dense weight of a site as `[o, i, *kernel]` on the CPU, in its own floating-point type.

        Still there after `replace`.
        """

    @abstractmethod
    def bias(self, name: str) -> Tensor | None:
        """The bias of a site's dense layer as `[o]`; still there after `replace`."""

    @abstractmethod
    def layer(self, name: str) -> Layer | None:
        """What replaced the site's dense layer, with current factors; None while it is dense.

        Raises `PlanError` for an unknown site.
        """

    @abstractmethod
    def replace(self, name: str, layer: Layer) -> None:
        """Put a factored layer at every use of the site; may be called again to change it.

        `layer.bias` replaces the site's bias.  Raises `PlanError` for an unknown site or a shape that does
        not fit.
        """

    def replaced(self) -> Mapping[str, Layer]:
        """The layers by site that a pass may go on to change; one that the model stores itself is not among them.

        By default all that stand in place of dense ones.
        """
        return {site.name: layer for site in self.sites() if (layer := self.layer(site.name)) is not None}

    def refused(self, form: Form) -> str:
        """Why no layer of this model can have that form; empty where one can."""
        return ""

    @abstractmethod
    def record(self, batch: Batch) -> Tape:
        """Run the model on a batch and record it; calls of sites that are still dense carry their names."""

    @abstractmethod
    def observe(self, *batches: Batch) -> None:
        """Fill in the sites' extents and the multiply-adds from a run on the first call.

        The model runs on all calls where it shows that they may differ.
        """

    @abstractmethod
    def run(self, batch: Batch) -> object:
        """Outputs on a batch, as tensors in the model's own structure (ONNX: a dict by output name)."""

    @abstractmethod
    def clone(self) -> Self:
        """An independent copy."""

    @abstractmethod
    def unwrap(self) -> object:
        """The model as the type that came in."""

    @abstractmethod
    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the deployable file of this front end, atomically, with `metadata` inside.

        Raises `UsageError` for a wrong suffix.
        """

    def reader(self) -> Callable[[Path], Model | None]:
        """How a file is opened again that a model made from this one is saved to.

        The function answers None where that cannot be.
        """
        return lambda path: None

    def stored(self, path: Path) -> StoredSize | None:
        """How small what `save` wrote there is beside plain tensors; None where it packs nothing."""
        return None

    def declined(self) -> Mapping[str, str]:
        """Other layers that hold weights, each with the reason why it is left alone."""
        return {}

    def check(self) -> None:
        """Raise `InvalidModelError` if the model is inconsistent."""
        self.check_weights()

    # where nothing is known of them, `weight` checks each that is read
    def check_weights(self) -> None:  # noqa: B027
        """Raise `InvalidModelError` where a weight is NaN or infinite."""

    def example(self) -> Batch | None:
        """Inputs the model can be run on, where it is known of itself (or from `observe`) what it takes."""
        return None

    def signature(self) -> Signature:
        """What it says of the inputs that it takes."""
        return Signature(others=True)

    def count(self, batch: Batch | None = None) -> Counted:
        """Multiply-adds of everything that runs when the model, as it is, is called.

        Layers, attention and recurrence count alike. By default with what was last observed; where that is
        nothing, none are counted.
        """
        call = batch or self.example()
        with counting() as counter:
            if call is not None:
                self.run(call)
        return counter.counted(1 if call is None else call.size)

    def macs(self) -> int:
        """Multiply-adds per sample as last observed; 0 where never observed."""
        return self.count().per_sample

    def params(self) -> int:
        """Stored numbers in all parameters, shared ones once; buffers such as running means not counted.

        By default those of the sites.
        """
        layers = ((self.layer(site.name), self.weight(site.name)) for site in self.sites())
        factors = sum(weight.numel() if layer is None else layer.storage.params for layer, weight in layers)
        return factors + sum(bias.numel() for bias in self._biases())

    def bytes(self) -> int:
        """Bytes of all parameters; by default those of the sites."""
        layers = ((self.layer(site.name), self.weight(site.name)) for site in self.sites())
        factors = sum(
            tensor.nbytes
            for layer, weight in layers
            for tensor in ([weight] if layer is None else layer.factors.values())
        )
        return factors + sum(bias.nbytes for bias in self._biases())

    def _biases(self) -> Iterator[Tensor]:
        for site in self.sites():
            layer = self.layer(site.name)
            bias = self.bias(site.name) if layer is None else layer.bias
            if bias is not None:
                yield bias


def call_batch(model: Model, batches: Sequence[Batch], size: int) -> Batch:
    """A call of `size` samples: from the data, else from the model's example.

    Raises `UsageError` where there is neither, or the model takes another number of samples.
    """
    fixed = model.signature().fixed_batch()
    if fixed not in (None, size):
        raise UsageError(
            f"the model takes exactly {fixed} samples at a time and cannot be timed with {size}; pass "
            f"batch={fixed} (--batch {fixed})"
        )
    example = batches[0] if batches else model.example()
    if example is None:
        raise UsageError(
            "planning on measured time needs to see the model running; pass data= or example_inputs= "
            "(--data, --input)"
        )
    return example.resized(size)


def few_samples(model: Model, batches: Sequence[Batch]) -> Batch:
    """Samples enough to follow what a run does with each channel, of the first of these batches."""
    return batches[0].part(0, 2) if batches[0].divisible else model.example() or batches[0]
