"""Weights that a model computes from constants: laid out anew, put together, or cast, each time it runs.

They are read as what they come to.  The nodes that compute them stay as they are until the layer that reads
them is replaced, and go with it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

import tdpass.models.onnx.graph.layout  # noqa: F401 - fills the table of functions
from tdpass.models.onnx.graph.functions import FUNCTIONS, NotServedError, Operator
from tdpass.models.onnx.graph.tensors import (
    FLOAT_TYPES,
    constant,
    from_torch,
    held,
    sizes,
    to_torch,
    torch_dtype,
)

REARRANGING = frozenset(
    {
        "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "CastLike",
        "Slice", "Concat", "Gather",
    }
)  # fmt: skip
_KNOWN = "tdpass.folded"
_OPSET = 13  # of these operators only the place of arguments differs, which the functions see by themselves
_DEEPEST = 32


def folded(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What a value always is: a constant, or what nodes that only rearrange make of floating-point constants.

    None for all else.  Nothing is computed before it is read.
    """
    if value is None:
        return None
    tensor = constant(value)
    if tensor is not None:
        return tensor
    if _KNOWN not in value.meta:
        value.meta[_KNOWN] = _fold(value)
    known: ir.TensorProtocol | None = value.meta[_KNOWN]
    return known


def folded_weight(value: ir.Value | None) -> ir.TensorProtocol:
    """What a value was found to be; raises `InvalidModelError` if it is that no longer."""
    return folded(value) or held(value)


def stored_type(value: ir.Value) -> ir.DataType:
    """The narrowest floating-point type that a folded value's numbers are stored in."""
    return min((held(source).dtype for source in number_sources(value)), key=lambda kind: kind.itemsize)


def sources(value: ir.Value) -> Iterator[ir.Value]:
    """The constants that a folded value is made of, those that only say how included."""
    for leaf, _ in _leaves(value):
        yield leaf


def number_sources(value: ir.Value) -> list[ir.Value]:
    """The floating-point constants among them."""
    found = [(source, constant(source)) for source in sources(value)]
    return [source for source, tensor in found if tensor is not None and tensor.dtype in FLOAT_TYPES]


def makers(value: ir.Value) -> set[ir.Node]:
    """The nodes that make a folded value of constants."""
    return {node for _, node in _leaves(value) if node is not None}


def other_reader(value: ir.Value, known: Container[ir.Node] = ()) -> ir.Node | None:
    """A node that reads a floating-point constant of a folded value, or returns it, but does not make it.

    The nodes that make the value, and those that are `known`, are left out.
    """
    inside = makers(value)
    for leaf, _ in _leaves(value):
        tensor = constant(leaf)
        if not inside or tensor is None or tensor.dtype not in FLOAT_TYPES:
            continue
        outside = (
            usage.node for usage in leaf.uses() if usage.node not in inside and usage.node not in known
        )
        found = next(outside, None)
        if found is not None:
            return found
    return None


def _leaves(value: ir.Value, depth: int = 0) -> Iterator[tuple[ir.Value, ir.Node | None]]:
    """The constants that a value is made of, each with every node on the way."""
    node = value.producer()
    if constant(value) is not None or node is None or depth > _DEEPEST:
        yield value, None
        return
    for read in node.inputs:
        if read is not None:
            yield from ((leaf, node if inner is None else inner) for leaf, inner in _leaves(read, depth + 1))
            yield read, node


def _fold(value: ir.Value) -> ir.TensorProtocol | None:
    node = value.producer()
    if node is None or not _rearranges(node) or not _only_floats(value):
        return None
    try:
        seen = _evaluated(value, content=False)
    except (NotServedError, RuntimeError, ValueError, IndexError, TypeError):
        return None
    if seen is None or 0 in seen.shape:
        return None
    dtype = from_torch(seen.new_empty(0, device="cpu")).dtype
    if dtype not in FLOAT_TYPES:
        return None
    return ir.LazyTensor(
        partial(_content, value), dtype, ir.Shape(list(seen.shape)), name=value.name or "folded"
    )


def _content(value: ir.Value) -> ir.TensorProtocol:
    made = _evaluated(value, content=True)
    assert made is not None
    return from_torch(made)


def _rearranges(node: ir.Node) -> bool:
    return not node.domain and node.op_type in REARRANGING and len(node.outputs) == 1


def _only_floats(value: ir.Value) -> bool:
    """Whether what is rearranged is of floating-point numbers, so that nothing in it was quantized."""
    node = value.producer()
    tensor = constant(value)
    if tensor is not None:
        return tensor.dtype in FLOAT_TYPES
    if node is None or not _rearranges(node):
        return False
    data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return all(read is not None and _only_floats(read) for read in data)


def _evaluated(value: ir.Value, *, content: bool, depth: int = 0) -> Tensor | None:
    """The value; without content only its type and sizes, on the meta device."""
    tensor = constant(value)
    if tensor is not None:
        if content or tensor.dtype not in FLOAT_TYPES:
            return to_torch(tensor)
        return torch.empty(sizes(tensor), dtype=torch_dtype(tensor.dtype), device="meta")
    node = value.producer()
    if node is None or not _rearranges(node) or depth > _DEEPEST:
        return None
    inputs = [
        None if read is None else _evaluated(read, content=content, depth=depth + 1) for read in node.inputs
    ]
    if any(made is None and read is not None for made, read in zip(inputs, node.inputs, strict=True)):
        return None
    if node.op_type == "Identity":
        return inputs[0]
    made = FUNCTIONS.get(node.op_type)(Operator(node.op_type, _OPSET, node.attributes), *inputs)
    return made if isinstance(made, Tensor) else None
