"""Tensors and constants as onnx_ir and as torch see them."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from tdpass.errors import InvalidModelError, UnsupportedError

FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_QUANTIZED_TYPES = frozenset(
    {
        ir.DataType.INT16,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT2,
        ir.DataType.UINT2,
    }
    | {
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.FLOAT4E2M1,
    }
)
PARAMETER_TYPES = FLOAT_TYPES | _QUANTIZED_TYPES
_MOST_FILLED = 2**27  # numbers that a few bytes of a file may ask for as a weight: half a GiB of float32


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """The torch type of an ONNX type; four-bit and two-bit integers are held as eight-bit ones.

    Raises `UnsupportedError` for strings and other types that torch has no counterpart of.
    """
    if dtype in (ir.DataType.INT4, ir.DataType.INT2):
        return torch.int8
    if dtype in (ir.DataType.UINT4, ir.DataType.UINT2):
        return torch.uint8
    try:
        return tensor_adapters.to_torch_dtype(dtype)
    except (TypeError, ValueError):
        raise UnsupportedError(
            f"ONNX tensors of type {dtype.name} have no torch counterpart; cast them in the model first"
        ) from None


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """The tensor in torch, sharing memory with the model (or its mapped file) where possible.

    It must not be written to.
    """
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach()
    dtype = torch_dtype(tensor.dtype)
    array = tensor.numpy()
    if tensor.dtype in (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2):
        return torch.from_numpy(array.astype(np.int8 if dtype is torch.int8 else np.uint8))
    if dtype is torch.bfloat16 or tensor.dtype.name.startswith("FLOAT8"):
        array = array.view(np.uint16 if array.itemsize == 2 else np.uint8)
    shared = from_memory(array)
    return shared if shared.dtype is dtype else shared.view(dtype)


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor; raises `InvalidModelError` where one of its numbers is NaN or infinite."""
    if tensor.numel():
        extremes = torch.stack(torch.aminmax(tensor))  # one pass, and NaN is passed on
        if not bool(torch.isfinite(extremes).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InvalidModelError(
                f"{bad} of {tensor.numel()} numbers of {name!r} are NaN or infinite; repair or retrain the "
                "model"
            )
    return tensor


def from_memory(array: np.ndarray) -> Tensor:
    """The array in torch, sharing its memory; it must not be written to."""
    # one of several types of that size, of which torch knows one
    array = array.view(np.dtype(array.dtype.str))
    with warnings.catch_warnings():
        # Mapped and protobuf memory is read-only; nothing here writes to it.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def from_torch(tensor: Tensor) -> ir.TensorProtocol:
    """The tensor for a graph, sharing memory.

    Strided views are made contiguous only while they are written out.
    """
    return tensor_adapters.TorchTensor(tensor.detach())


def lent(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor for another value: what has a name takes that of the value, and it keeps its own."""
    return ir.LazyTensor(partial(_itself, tensor), tensor.dtype, tensor.shape, name=tensor.name)  # type: ignore[arg-type]


def _itself(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return tensor


def constant(value: ir.Value | None, *, default: bool = False) -> ir.TensorProtocol | None:
    """What the value always is, or by `default` what it is unless a caller overrides it; else None.

    It is an initializer that no caller can override, or the output of a Constant node, or of a
    ConstantOfShape whose shape is one of these.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() and not default else value.const_value
    producer = value.producer()
    if producer is None or producer.domain or producer.op_type not in _MAKERS:
        return None
    return _MAKERS[producer.op_type](producer, default=default)


def _content(node: ir.Node, **_how: bool) -> ir.TensorProtocol | None:
    """The tensor of a Constant node; None for strings and sparse tensors."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name in {"value_float", "value_floats"}:
            return ir.tensor(attribute.value, ir.DataType.FLOAT)
        if name in {"value_int", "value_ints"}:
            return ir.tensor(attribute.value, ir.DataType.INT64)
    return None


def _filled(node: ir.Node, *, default: bool) -> ir.TensorProtocol | None:
    """One floating-point number at every place of a constant shape, in the memory of that number.

    None for other types, and for more numbers than are read.
    """
    shape = constant(node.inputs[0], default=default)
    if shape is None or shape.dtype is not ir.DataType.INT64 or len(shape.shape) != 1:
        return None
    wanted = [int(size) for size in shape.numpy()]
    if any(size < 1 for size in wanted) or math.prod(wanted) > _MOST_FILLED:
        return None
    fill = node.attributes["value"].as_tensor() if "value" in node.attributes else ir.tensor([0.0])
    if fill.dtype not in FLOAT_TYPES or fill.size != 1:
        return None
    return from_torch(to_torch(fill).reshape(()).expand(wanted))


_MAKERS = {"Constant": _content, "ConstantOfShape": _filled}


def held(value: ir.Value | None) -> ir.TensorProtocol:
    """The constant that a value was found to be; raises `InvalidModelError` if it is one no longer."""
    tensor = constant(value)
    if tensor is None:
        raise InvalidModelError(
            f"{'an absent input' if value is None else repr(value.name)} is not a constant; keep the graph "
            "that was opened unchanged"
        )
    return tensor


def dims(value: ir.Value | ir.TensorProtocol) -> tuple[int | None, ...] | None:
    """Sizes as declared, None for each that is open (symbolic, or negative as some exporters write it).

    None where even the rank is unknown.
    """
    shape = value.shape
    return (
        None
        if shape is None
        else tuple(size if isinstance(size, int) and size >= 0 else None for size in shape.dims)
    )


def sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Sizes of a tensor that is there."""
    return tuple(int(size) for size in tensor.shape.numpy())
