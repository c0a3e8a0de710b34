"""What a graph says of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.base import Batch
from tdpass.models.onnx.graph.tensors import dims, torch_dtype
from tdpass.models.signature import Dims, Input, Signature

_TAKEN = (
    "{count} initializers that were also inputs are taken for weights, and are inputs no more: {names}; "
    "pass overridable=[...] (--overridable NAME) for those that callers set"
)


def signature(graph: ir.Graph, constants: Sequence[str] = (), renamed: int = 0) -> Signature:
    """Inputs by name, type and sizes; those that an initializer gives a default are not required.

    `constants` were inputs with one, and so many nodes were `renamed`.
    """
    inputs = tuple(
        Input(
            value.name or "",
            None if value.dtype is None else torch_dtype(value.dtype),
            _sizes(value),
            not value.is_initializer(),
        )
        for value in graph.inputs
    )
    notes = (
        ()
        if not constants
        else (
            _TAKEN.format(
                count=len(constants), names=", ".join(constants[:4]) + (", ..." if len(constants) > 4 else "")
            ),
        )
    )
    if renamed:
        notes = (*notes, f"{renamed} nodes that had the name of another have names of their own")
    return Signature(inputs, tuple(_sizes(value) for value in graph.outputs), notes=notes)


def _sizes(value: ir.Value) -> Dims | None:
    """Sizes that are fixed, and the names of those that are open."""
    fixed = dims(value)
    if fixed is None or value.shape is None:
        return None
    named = [size.value if isinstance(size, ir.SymbolicDim) else None for size in value.shape.dims]
    return tuple(name or "" if size is None else size for size, name in zip(fixed, named, strict=True))


def bind(graph: ir.Graph, batch: Batch) -> dict[str, Tensor]:
    """Tensors by input name: positional ones in the graph's order, then those given by name.

    Raises `InvalidModelError` for what does not fit.
    """
    return signature(graph).bind(batch)


def declared_example(graph: ir.Graph) -> Batch | None:
    """Two samples (or as many as the graph fixes) of every input, where only the axis of the samples is open.

    None where more is. Floating-point inputs are random, others are ones: a token and a mask bit that most
    models accept.
    """
    declared = signature(graph)
    inputs = [entry for entry in declared.inputs if entry.required]
    names = {entry.dims[0] for entry in inputs if entry.dims and isinstance(entry.dims[0], str)}
    axes = declared.fixed_axes(inputs) if not names else tuple(_open_axis(entry, names) for entry in inputs)
    tensors: list[Tensor] = []
    for entry, axis in zip(inputs, axes, strict=True):
        if entry.dims is None or entry.dtype is None:
            return None
        shape = [
            2 if isinstance(size, str) and position == axis else size
            for position, size in enumerate(entry.dims)
        ]
        sizes = [size for size in shape if not isinstance(size, str)]
        if len(sizes) < len(shape):
            return None
        generator = torch.Generator().manual_seed(0)
        dtype = entry.dtype
        tensors.append(
            torch.randn(sizes, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.ones(sizes, dtype=dtype)
        )
    return Batch(tuple(tensors), axes=axes, whole=not names) if tensors else None


def _open_axis(entry: Input, names: set[str]) -> int | None:
    return next((axis for axis, size in enumerate(entry.dims or ()) if size in names), None)
