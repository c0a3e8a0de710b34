"""A model's forward and backward pass compiled by inductor, for training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tdpass.errors import TrainingError


def forward_of(model: nn.Module, compiled: bool) -> Callable[..., Any]:
    """What runs the model; compiled at its first call where asked for.

    Weights stay where they are, so what changes them in place (optimizers, terms, checkpoints) acts on
    compiled code too.
    """
    if not compiled:
        return model
    run: Callable[..., Any] = torch.compile(model)
    return run


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Failures of the compiler as `TrainingError`."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            summary = str(error).strip().partition("\n")[0]
            raise TrainingError(
                f"the model cannot be compiled ({type(error).__name__}: {summary}); train it without compile"
            ) from error
        raise
