"""What goes into a model, and which part of what comes out are class scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from tdpass.errors import UsageError


def call(model: Callable[..., Any], inputs: object) -> object:
    """The model's outputs on a batch: positional inputs from a tuple or list, named ones from a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


Passes: TypeAlias = Callable[[Callable[[Any], Any], Any, Callable[[Any], Tensor]], Iterator[Tensor]]


def once(forward: Callable[[Any], Any], inputs: Any, loss: Callable[[Any], Tensor]) -> Iterator[Tensor]:
    """The runs of a model that a step takes, each as the loss it adds: here one run on the whole batch.

    Gradients of each loss are taken before the next is asked for, and add up.  `loss(outputs)` is the task's
    loss with what the terms add; a method with several runs (at several widths, say) may yield others, of the
    outputs it has seen.
    """
    yield loss(forward(inputs))


def class_scores(outputs: object) -> Tensor:
    """The tensor a model returned, or the `logits` in what it returned.

    Raises `UsageError` where there are none.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor):
        raise UsageError(
            f"the model returned a {type(outputs).__name__}; cross-entropy and distillation need class "
            "scores: a tensor, or one named 'logits'. "
            "Give objective= for another loss, and leave distillation out"
        )
    return found
