"""What only some front ends can do with a model: who needs it asks `isinstance(model, ...)`, and says so where it is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from tdpass.models.batch import Batch

Note = Callable[[str], None]
Decline = Callable[[str, str], None]


def no_reasons(name: str, reason: str) -> None:
    """Does nothing with why something was declined."""


@runtime_checkable
class FoldsBatchNorm(Protocol):
    """Its batch-norms can become part of the layers before them."""

    def fold_batchnorm(self, decline: Decline = no_reasons) -> Sequence[str]:
        """Fold every batch-norm that directly follows a site's only use into that site; returns the sites changed.

        `decline` takes a batch-norm that follows a site, and why it stays.
        """


@runtime_checkable
class RecalibratesBatchNorm(Protocol):
    """Its batch-norms keep statistics that can be estimated anew."""

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        """Estimate all running statistics anew; returns how to undo that, or None where there is no batch-norm left."""


@runtime_checkable
class FusesChains(Protocol):
    """Chains of its layers can run as one operator."""

    def fuse(self, note: Note, decline: Decline, samples: Batch | None = None) -> bool:
        """Make one operator of each chain of layers that is faster so, timed on `samples`, else on the example; whether anything changed.

        What changes is how the model runs, not what it computes, how its tensors are named or what `layer` answers.  `note` takes
        a line about the whole, `decline` a layer and why it is left alone.
        """


@runtime_checkable
class RunsAsModule(Protocol):
    """A torch module computes what it does."""

    def inference_module(self) -> nn.Module:
        """An independent module that computes what the model does, every part of it in evaluation mode."""


@runtime_checkable
class RunsAsGraph(Protocol):
    """The file that it is saved to is a graph, run on inputs by name."""

    def named_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The batch by input name; raises `InvalidModelError` where it does not fit."""
