"""Weights that a model computes from constants: laid out anew, put together, cast or scaled, each time it runs.

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
from tdpass.models.onnx.graph.stored_integers import Integers, numbered
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
_REDUCING = frozenset({"ReduceL2"})
COMPUTING = _REDUCING | {"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Pow"}
_READING_NUMBERS = COMPUTING - _REDUCING | {"Concat"}  # by all their inputs; the others by the first
_SCALING = "DequantizeLinear"
_KNOWN = "tdpass.folded"
_OPSET = 13  # of these operators only the place of arguments differs, which the functions see by themselves
_DEEPEST = 32


def folded(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What a value always is: a constant, or what simple nodes make of floating-point constants.

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


def numbers_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What `folded` says, and of integers that a DequantizeLinear makes numbers of, these numbers."""
    tensor = folded(value)
    integers = numbered(value) if tensor is None and value is not None else None
    return tensor if integers is None else as_numbers(integers)


def as_numbers(integers: Integers) -> ir.TensorProtocol:
    """The numbers that integers stand for, computed when they are read."""
    return ir.LazyTensor(
        partial(_numbers, integers),
        ir.DataType.FLOAT,
        ir.Shape(list(integers.shape)),
        name=integers.source.name or "integers",
    )


def _numbers(integers: Integers) -> ir.TensorProtocol:
    return from_torch(integers.numbers())


def folded_weight(value: ir.Value | None) -> ir.TensorProtocol:
    """What a value was found to be; raises `InvalidModelError` if it is that no longer."""
    return numbers_of(value) or held(value)


def stored_type(value: ir.Value) -> ir.DataType:
    """The narrowest floating-point type that a folded value's numbers are stored in, or made of integers."""
    kinds = (held(source).dtype for source in number_sources(value))
    floats = [kind for kind in kinds if kind in FLOAT_TYPES]
    return min(floats, key=lambda kind: kind.itemsize, default=folded_weight(value).dtype)


def sources(value: ir.Value) -> Iterator[ir.Value]:
    """The constants that a folded value is made of, those that only say how included."""
    for leaf, _ in _leaves(value):
        yield leaf


def number_sources(value: ir.Value) -> list[ir.Value]:
    """The constants among them that hold the numbers: of floating point, or integers with a scale."""
    return [source for source in sources(value) if _holds_numbers(source)]


def _holds_numbers(source: ir.Value) -> bool:
    tensor = constant(source)
    scaled = (usage.node.op_type == _SCALING and usage.idx == 0 for usage in source.uses())
    return tensor is not None and (tensor.dtype in FLOAT_TYPES or any(scaled))


def makers(value: ir.Value) -> set[ir.Node]:
    """The nodes that make a folded value of constants."""
    return {node for _, node in _leaves(value) if node is not None}


def other_reader(value: ir.Value, known: Container[ir.Node] = ()) -> ir.Node | None:
    """A node that reads a constant of a folded value's numbers, or returns it, but does not make it.

    The nodes that make the value, and those that are `known`, are left out.
    """
    inside = makers(value)
    for leaf, _ in _leaves(value):
        if not inside or not _holds_numbers(leaf):
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
    for read in node.inputs[:1] if node.op_type == _SCALING else node.inputs:
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
    return not node.domain and node.op_type in REARRANGING | COMPUTING and len(node.outputs) == 1


def _only_floats(value: ir.Value) -> bool:
    """Whether what is rearranged is of floating-point numbers, so that nothing in it was quantized."""
    node = value.producer()
    tensor = constant(value)
    if tensor is not None:
        return tensor.dtype in FLOAT_TYPES
    if node is None or not _rearranges(node):
        return False
    data = node.inputs if node.op_type in _READING_NUMBERS else node.inputs[:1]
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
