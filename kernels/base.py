"""Operators: one schema and one reference each; implementations for devices are added beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from tdpass.kernels.flops import count_products
from tdpass.products import Count
from tdpass.registry import Registry

NAMESPACE = "tdpass"
_LIBRARY: Any = Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_IN_PYTHON: dict[
    str, Any
] = {}  # per operator, the library that gives the CPU its Python implementation; dropped, it gives it up
_COMPILED: set[str] = set()
_FORCED: list[str] = []
_FORCE: list[Callable[[bool], None]] = []

Implementation = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Op:
    """A fused operator.

    `schema` is what follows the name, in torch's notation; `reference` computes it with ordinary operations
    and is what every implementation is tested against; `fake` gives shapes and strides alone; `macs` are the
    multiply-adds of a call, from its output and its arguments.
    """

    name: str
    schema: str
    reference: Implementation
    fake: Implementation
    macs: Count

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
    count_products(op.name, op.macs)

    _LIBRARY.impl(op.name, _runs(op, "cuda"), "CUDA")
    if op.name in _COMPILED:
        _define_reference(op)
    else:
        _IN_PYTHON[op.name] = _cpu_in_python(op)
    return op


def serve_compiled(load: Callable[[], tuple[Sequence[str], Callable[[bool], None]]]) -> None:
    """Let operators that a C++ library registers take the place of the Python ones on the CPU.

    `load` loads it, and returns the names it serves and how to make it use references; what it does not serve
    is asked for as the operator `NAME_reference`.  Where it raises, everything stays as it was.
    """
    _IN_PYTHON.clear()  # before it registers: two for one device would be an override, with a warning
    try:
        names, force = load()
        _COMPILED.update(names)
        _FORCE.append(force)
    finally:
        for op in OPS:
            if op.name in _COMPILED:
                _define_reference(op)
            else:
                _IN_PYTHON[op.name] = _cpu_in_python(op)


def compiled() -> tuple[str, ...]:
    """The operators that a C++ library serves on the CPU."""
    return tuple(sorted(_COMPILED))


def _runs(op: Op, device: str) -> Implementation:
    def run(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        native = IMPLEMENTATIONS.get((op.name, device))
        if native is not None and not _FORCED:
            result = native(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return op.reference(*args, **kwargs)

    return run


def _cpu_in_python(op: Op) -> Any:
    library: Any = Library(NAMESPACE, "IMPL")  # type: ignore[no-untyped-call]
    library.impl(op.name, _runs(op, "cpu"), "CPU")
    return library


def _define_reference(op: Op) -> None:
    _LIBRARY.define(f"{op.name}_reference{op.schema}")
    _LIBRARY.impl(f"{op.name}_reference", op.reference, "CompositeImplicitAutograd")


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
    for force in _FORCE:
        force(True)
    try:
        yield
    finally:
        _FORCED.pop()
        for force in _FORCE:
            force(bool(_FORCED))
