"""Floating-point tensors as bit patterns, and numbers as the bit patterns of a type."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Bits = npt.NDArray[Any]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


def to_bits(tensor: Tensor) -> Bits:
    """A flat array of unsigned integers."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    bits: Bits = flat.view(_SIGNED[tensor.element_size()]).numpy().view(_UNSIGNED[tensor.element_size()])
    return bits


def from_bits(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor with those bits."""
    return torch.from_numpy(bits.view(bits.dtype.str.replace("u", "i"))).view(dtype).reshape(shape)


def unsigned(dtype: torch.dtype) -> np.dtype[Any]:
    """The integers that hold the bits of a type."""
    return _UNSIGNED[dtype.itemsize]


def sign_bit(dtype: torch.dtype) -> Any:
    """The bits of -0.0."""
    return unsigned(dtype).type(1 << (8 * dtype.itemsize - 1))


def numbers(bits: Bits, dtype: torch.dtype) -> Floats:
    """What the bits stand for."""
    values: Floats = from_bits(bits, dtype, bits.shape).double().numpy()
    return values


def rounded(values: Floats, dtype: torch.dtype) -> Bits:
    """The bits of numbers rounded to a type, half precisions by way of float32.

    Each step rounds to nearest even, on any machine.
    """
    exact = torch.from_numpy(np.ascontiguousarray(values))
    return to_bits(exact if dtype is torch.float64 else exact.float().to(dtype))


def spacing(values: Floats, dtype: torch.dtype) -> Floats:
    """About the distance to the next number of the type.

    Halved first, since there is none after the largest.
    """
    narrow = {torch.float64: np.float64, torch.float16: np.float16}.get(dtype, np.float32)
    gaps: Floats = np.spacing((values / 2).astype(narrow)).astype(np.float64)
    return gaps * (2 << 16 if dtype is torch.bfloat16 else 2)
