"""What only some front ends can do with a model.

Who needs it asks `isinstance(model, ...)`, and says so where it is none.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from tdpass.form import Form
from tdpass.models.batch import Batch
from tdpass.models.streams import HeadChange, StreamEdits

_STEPS = 255

Note = Callable[[str], None]
Decline = Callable[[str, str], None]


def no_reasons(name: str, reason: str) -> None:
    """Does nothing with why something was declined."""


@runtime_checkable
class FoldsBatchNorm(Protocol):
    """Its batch-norms can become part of the layers before them."""

    def fold_batchnorm(self, decline: Decline = no_reasons) -> Sequence[str]:
        """Fold every batch-norm that directly follows a site's only use into that site.

        Returns the sites changed. `decline` takes a batch-norm that follows a site, and why it stays.
        """


@runtime_checkable
class DividesLayers(Protocol):
    """Layers that make several projections at once can become one layer for each."""

    def divide(self, decline: Decline = no_reasons) -> Sequence[str]:
        """Make sites of the slices of a weight that make what is read apart, such as query, key and value.

        Returns the names of what was divided; what the model computes stays. `decline` takes what could have
        been, and why it stays.
        """

    def join(self) -> Sequence[str]:
        """Make whole again what was divided and of which no slice was replaced; returns the names."""


@runtime_checkable
class MakesPlain(Protocol):
    """Layers may compute a weight from other parameters."""

    def make_plain(self) -> Sequence[str]:
        """Make a parameter of every such weight, in place; returns the names of the layers.

        What the model computes stays; training goes on without the norm or the mask.
        """


@runtime_checkable
class RecalibratesBatchNorm(Protocol):
    """Its batch-norms keep statistics that can be estimated anew."""

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        """Estimate all running statistics anew.

        Returns how to undo that, or None where there is no batch-norm left.
        """


@runtime_checkable
class ScalesNorms(Protocol):
    """What its norms make can be scaled by channel, against the columns of the layers that read it."""

    def norms(self, decline: Decline = no_reasons) -> Mapping[str, Sequence[str]]:
        """The norms that nothing but dense linear sites reads, by name, with these sites.

        `decline` takes another norm, and why it is none.
        """

    def scale_norm(self, name: str, scale: Tensor) -> None:
        """Divide what a norm makes by `scale`, by channel; multiply the columns of the sites that read it."""


@runtime_checkable
class FusesChains(Protocol):
    """Chains of its layers can run as one operator."""

    def fuse(self, note: Note, decline: Decline, samples: Batch | None = None) -> bool:
        """Make one operator of each chain of layers that is faster so; whether anything changed.

        It is timed on `samples`, else on the example. What changes is how the model runs, not what it
        computes, how its tensors are named or what `layer` answers.  `note` takes a line about the whole,
        `decline` a layer and why it is left alone.
        """


@runtime_checkable
class RoundsInOperators(Protocol):
    """Operators that its chains of layers became may round what they read."""

    def grain(self) -> float:
        """The step, relative to the largest number, that all of this comes to; 0 where none does.

        What is rounded in several places adds up in squares.
        """


@runtime_checkable
class TimesRecurrentNodes(Protocol):
    """Its recurrent nodes become other nodes where their steps have factors, which may take longer."""

    def recurrent_times(self, samples: Batch) -> Iterator[tuple[str, float, float]]:
        """Every such node's name, its seconds as it was, and those that it takes.

        They are measured on one thread on these samples.
        """


@runtime_checkable
class SettlesChannels(Protocol):
    """Layers that stand for its sites with fewer channels can become dense layers of its own."""

    def settle_channels(self) -> Mapping[str, Form]:
        """Take every dense layer with fewer channels for the site's own: a site of that many, not replaced.

        Returns their forms by site.
        """


@runtime_checkable
class ResizesHeads(Protocol):
    """What says how many heads attention has, and how wide, can follow its layers."""

    def resize_heads(self, heads: Mapping[str, HeadChange]) -> None:
        """Say what heads the layers of these sites have; those with fewer channels are in place already."""


@runtime_checkable
class SlicesStreams(Protocol):
    """Values that its layers add to and its norms read can have other coordinates, and fewer of them."""

    def slice_streams(self, edits: StreamEdits) -> None:
        """Put other weights, norms and tables in place of those the edits name; all its layers must be dense.

        Raises `UnsupportedError`, with the model as it was, where it holds one in a way that cannot change.
        """


@dataclass(frozen=True)
class Range:
    """The numbers that a tensor is to hold; zero is always among them."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """The step of eight bits; one where the tensor is always zero."""
        return (max(self.high, 0.0) - min(self.low, 0.0)) / _STEPS or 1.0

    @property
    def zero(self) -> int:
        """The code of zero, 0 to 255."""
        return max(0, min(_STEPS, round(-min(self.low, 0.0) / self.scale)))


@runtime_checkable
class HoldsIntegerActivations(Protocol):
    """Tensors between its layers can be integers of eight bits."""

    def integer_layers(self) -> Sequence[str]:
        """The layers whose weights are integers already, so that what they read and make may be.

        Raises `UnsupportedError` where none can.
        """

    def activations(self, without: Container[str] = ()) -> Sequence[str]:
        """The tensors that may be integers where those layers stay as they are."""

    def watch(self, names: Sequence[str], batch: Batch) -> Mapping[str, Tensor]:
        """What these tensors hold in a run."""

    def hold_integers(self, ranges: Mapping[str, Range]) -> None:
        """Let these tensors, and no others, be integers of eight bits."""

    def held_integers(self) -> Mapping[str, Range]:
        """The tensors that are integers."""


@runtime_checkable
class RunsAsModule(Protocol):
    """A torch module computes what it does."""

    def inference_module(self) -> nn.Module:
        """An independent module that computes what the model does, every part of it in evaluation mode."""


@runtime_checkable
class HoldsProgram(Protocol):
    """The file that it is saved to can say how it is built."""

    def described(self, call: Batch) -> dict[str, str]:
        """What to add to the file's metadata, for calls such as that.

        Raises `UnsupportedError` where that cannot be.
        """


@runtime_checkable
class RunsAsGraph(Protocol):
    """The file that it is saved to is a graph, run on inputs by name."""

    def named_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The batch by input name; raises `InvalidModelError` where it does not fit."""
