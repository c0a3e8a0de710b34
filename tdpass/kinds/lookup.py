"""Rows of a weight read one by one: what an embedding does with its matrix, which is a layer as well."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

LOOKUPS: frozenset[Callable[..., object]] = frozenset({F.embedding})
STORED_FIRST = frozenset({torch.ops.aten.embedding.default})
"""The same in exported programs, the table before what is looked up."""


def is_lookup(function: object) -> bool:
    """Whether a running model reads rows by that function, which takes their numbers and the table."""
    return function in LOOKUPS


def is_table(module: nn.Module) -> bool:
    """Whether a module is an embedding."""
    return isinstance(module, nn.Embedding)


def why_no_table(module: nn.Module) -> str:
    """Why the rows of an embedding must be read as they are stored; empty where they need not."""
    if type(module).forward is not nn.Embedding.forward or "forward" in module.__dict__:
        return f"{type(module).__name__} overrides forward"
    if not {*module._parameters} <= {"weight"} or module._buffers or module._modules:
        return f"{type(module).__name__} holds more than a weight"
    if getattr(module, "max_norm", None) is not None:
        return "it scales rows of its weight down while it runs (max_norm)"
    return "it learns by sparse gradients (sparse=True)" if getattr(module, "sparse", False) else ""
