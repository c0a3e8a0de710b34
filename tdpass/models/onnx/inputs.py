"""Binding a batch to the inputs of a graph."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.errors import InvalidModelError
from tdpass.models.base import Batch
from tdpass.models.onnx.tensors import dims, torch_dtype


def bind(graph: ir.Graph, batch: Batch) -> dict[str, Tensor]:
    """Tensors by input name: positional ones in the graph's order, then those given by name.

    Raises `InvalidModelError`, listing what the model expects, for a wrong name, count, type or shape.
    """
    expected = {value.name or "": value for value in graph.inputs}
    needed = {name: value for name, value in expected.items() if not value.is_initializer()}
    if len(batch.args) > len(needed):
        raise _unfit(needed, f"the batch has {len(batch.args)} positional tensors")
    bound = dict(zip(needed, batch.args, strict=False))
    for name, tensor in batch.kwargs.items():
        if name not in expected:
            raise _unfit(needed, f"the model has no input {name!r}")
        if name in bound:
            raise _unfit(needed, f"input {name!r} is given twice")
        bound[name] = tensor
    missing = [name for name in needed if name not in bound]
    if missing:
        raise _unfit(needed, f"the batch lacks {', '.join(missing)}")
    for name, tensor in bound.items():
        _check(expected[name], tensor, needed)
    return bound


def _check(value: ir.Value, tensor: Tensor, needed: dict[str, ir.Value]) -> None:
    given = f"input {value.name!r} is {_describe(tensor.dtype, tensor.shape)}"
    if value.dtype is not None and tensor.dtype is not torch_dtype(value.dtype):
        raise _unfit(needed, given)
    declared = dims(value)
    if declared is not None and (len(declared) != tensor.dim() or any(n not in (None, size) for n, size in zip(declared, tensor.shape, strict=True))):
        raise _unfit(needed, given)


def _unfit(needed: dict[str, ir.Value], problem: str) -> InvalidModelError:
    wanted = [f"{name}: {_describe(None if value.dtype is None else torch_dtype(value.dtype), value.shape)}" for name, value in needed.items()]
    return InvalidModelError(f"{problem}; the model takes {', '.join(wanted) or 'no inputs'}")


def _describe(dtype: object, shape: Iterable[object] | None) -> str:
    sizes = "of any shape" if shape is None else "[" + ", ".join("?" if str(size) == "None" else str(size) for size in shape) + "]"
    return f"{str(dtype).removeprefix('torch.')} {sizes}"


def declared_example(graph: ir.Graph) -> Batch | None:
    """Two samples (or as many as the graph fixes) of every input, where only the first axis is open; None where more is.

    Floating-point inputs are random, others are ones: a token and a mask bit that most models accept.
    """
    tensors: list[Tensor] = []
    for value in graph.inputs:
        if value.is_initializer():
            continue
        declared = dims(value)
        if declared is None or value.dtype is None or not declared or None in declared[1:]:
            return None
        dtype = torch_dtype(value.dtype)
        shape = [2 if size is None else size for size in declared]
        generator = torch.Generator().manual_seed(0)
        tensors.append(torch.randn(shape, generator=generator).to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype))
    return Batch(tuple(tensors)) if tensors else None
