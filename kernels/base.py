"""Operators: one schema and one reference each; implementations for devices are added beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from tdpass.registry import Registry

NAMESPACE = "tdpass"
_LIBRARY: Any = Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_FORCED: list[str] = []

Implementation = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Op:
    """A fused operator.

    `schema` is what follows the name, in torch's notation; `reference` computes it with ordinary operations and is what
    every implementation is tested against; `fake` gives shapes and strides alone.
    """

    name: str
    schema: str
    reference: Implementation
    fake: Implementation

    @property
    def call(self) -> Any:
        """The operator as `torch.ops` has it."""
        return getattr(torch.ops.tdpass, self.name).default


OPS: Registry[Op] = Registry("operator")
IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {}


def register_op(op: Op) -> Op:
    """Define an operator; on every device that has no implementation of its own, its reference serves.

    An implementation may return NotImplemented for arguments that it does not serve; the reference then does.
    """
    OPS.add(op.name, op)
    _LIBRARY.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=_LIBRARY)

    def run_on(device: str) -> Implementation:
        def run(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
            native = IMPLEMENTATIONS.get((op.name, device))
            if native is not None and "reference" not in _FORCED:
                result = native(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return op.reference(*args, **kwargs)

        return run

    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        _LIBRARY.impl(op.name, run_on(device), key)
    return op


def implements(name: str, device: str) -> Callable[[Implementation], Implementation]:
    """Decorator: this function runs operator `name` on `device` ("cpu" or "cuda")."""

    def add(function: Implementation) -> Implementation:
        OPS.get(name)
        IMPLEMENTATIONS[name, device] = function
        return function

    return add


@contextmanager
def use_reference() -> Iterator[None]:
    """Within it, every operator runs its reference."""
    _FORCED.append("reference")
    try:
        yield
    finally:
        _FORCED.pop()
