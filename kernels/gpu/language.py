"""What all kernels share: the epilogue and the product as Triton functions.

Also how torch's types and settings map to Triton's.

Under `TRITON_INTERPRET=1` the kernels run on CPU tensors, slowly, for tests; products are then made in
float32, because the interpreter multiplies bfloat16 and float8 as if they were integers.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdpass.errors import KernelError, UnsupportedError
from tdpass.kernels.activation import Activation, check_activation

Precision = Literal["ieee", "tf32", "tf32x3"]
INTERPRETED: bool = triton.knobs.runtime.interpret
_FUNCTIONS = {"identity": 0, "clamp": 1, "silu": 2, "gelu": 3}
LARGEST_RANK = 256  # what a tile of rows can hold in registers beside its accumulator
_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
_FLOAT8 = (8, 9)  # the compute capability that float8 is multiplied from
_PRECISIONS = ("ieee", "tf32", "tf32x3")


def jit(function: Callable[..., None] | Callable[..., Any]) -> Any:
    """`triton.jit`, typed so that what it makes may be launched and called from other kernels."""
    return triton.jit(function)


@jit
def product(
    a: tl.tensor, b: tl.tensor, total: tl.tensor,
    compute: tl.constexpr, precision: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`total + a b` with operands rounded to `compute` and a float32 sum."""
    return tl.dot(a.to(compute), b.to(compute), total, input_precision=precision)


@jit
def activated(total: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """What `activation_of` says, float32."""
    if activation & 3 == 1:
        low = tl.full((), (activation >> 2) & 0xFFFFFFFF, tl.uint32).to(tl.float32, bitcast=True)
        high = tl.full((), activation >> 34, tl.uint32).to(tl.float32, bitcast=True)
        total = tl.where(total < low, low, total)  # not a maximum: a NaN stays one
        total = tl.where(total > high, high, total)
    elif activation & 3 == 2:
        total = total / (1.0 + tl.exp(-total))
    elif activation & 3 == 3:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    return total


@jit
def finish(
    total: tl.tensor, bias: tl.tensor, rest: tl.tensor, place: tl.tensor, there: tl.tensor, mask: tl.tensor,
    activation: tl.constexpr, biased: tl.constexpr, rested: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`activation(total + bias[place] + rest)`, float32.

    `there` masks `place`, `mask` the pointers `rest`; all broadcast to `total`.
    """
    if biased:
        total += tl.load(bias + place, mask=there, other=0.0).to(tl.float32)
    if rested:
        total += tl.load(rest, mask=mask, other=0.0).to(tl.float32)
    return activated(total, activation)


def activation_of(text: str) -> int:
    """The number of a function, and above its two bits those of the ends of a clamp, float32.

    A number for all is what every version of Triton hands on between kernels as a constant.  Raises
    `KernelError` for a text that is not known.
    """
    said = Activation.read(text)
    ends: tuple[int, int] = struct.unpack("=2I", struct.pack("=2f", *map(single, (said.low, said.high))))
    return _FUNCTIONS[said.function] | ends[0] << 2 | ends[1] << 34


def triton_type(dtype: torch.dtype) -> Any:
    """The type in which products with operands of `dtype` are made."""
    if dtype not in _TYPES:
        raise UnsupportedError(
            f"the GPU kernels compute in {', '.join(str(known) for known in _TYPES)}, not in {dtype}; the "
            "operator's reference serves it"
        )
    return tl.float32 if INTERPRETED and dtype in {torch.bfloat16, torch.float8_e4m3fn} else _TYPES[dtype]


def check(x: Tensor, activation: str, *others: Tensor | None) -> None:
    """Raise `UnsupportedError` or `KernelError` unless kernels read these tensors and know the activation."""
    check_operands(x, activation, *others)
    triton_type(x.dtype)


def check_operands(x: Tensor, activation: str, *others: Tensor | None) -> None:
    """The same whatever the type of x, which may be bytes."""
    check_activation(activation)
    if not (on_this_device(x) or INTERPRETED):
        raise UnsupportedError(
            f"the GPU kernels read CUDA tensors, this one is on {x.device}; set TRITON_INTERPRET=1 to test "
            "them without a device"
        )
    for other in others:
        if other is not None and other.device != x.device:
            raise KernelError(
                f"x is on {x.device} and another operand on {other.device}; move them to one device"
            )
    narrow = any(each is not None and each.dtype == torch.float8_e4m3fn for each in (x, *others))
    if narrow and capability_of(x) < _FLOAT8:
        raise UnsupportedError(
            f"a device of compute capability {'.'.join(map(str, capability_of(x)))} has no float8 arithmetic"
            "; one of 8.9 or newer has"
        )


def capability_of(x: Tensor) -> tuple[int, int]:
    """Compute capability of the device on which the kernels read x; interpreted they can all."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else _FLOAT8


def on_this_device(x: Tensor) -> bool:
    """Whether x lies where compiled kernels read it."""
    return x.is_cuda


def bias_of(bias: Tensor | None, columns: int) -> Tensor | None:
    """The bias as the kernels read it: one number per column, without gaps."""
    if bias is not None and bias.shape != (columns,):
        raise KernelError(
            f"bias{tuple(bias.shape)} does not fit an output of {columns} channels; it is [{columns}]"
        )
    return None if bias is None else bias.contiguous()


def precision_of(x: Tensor, kind: Literal["matmul", "conv"], asked: Precision | None) -> Precision:
    """How float32 products are made: as asked for, else as torch is set to make them.

    The other types have but one way.
    """
    if asked is not None and asked not in _PRECISIONS:
        raise KernelError(f"precision {asked!r} is not known; it is one of {', '.join(_PRECISIONS)}")
    if x.dtype != torch.float32:
        return "tf32"
    if asked is not None:
        return asked
    backends: Any = torch.backends
    setting = (backends.cuda.matmul if kind == "matmul" else backends.cudnn.conv).fp32_precision
    return "tf32" if setting == "tf32" else "ieee"


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Within it launches go to the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def single(number: float) -> float:
    """The number rounded to float32."""
    return ctypes.c_float(number).value


def power(size: int, least: int = 16) -> int:
    """The power of two that holds `size`.

    At least 16, the least side of a tile that tensor cores multiply.
    """
    return max(least, 1 << max(0, size - 1).bit_length())


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)
