"""Integers of a few bits, packed into bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BYTE = 8  # bits


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers of so many bits one after another in bytes, the lowest bit first.

    Zero bits fill the last byte.
    """
    if bits == _BYTE:
        return values.reshape(-1).to(torch.uint8)
    flat = values.reshape(-1, 1).to(torch.int16) & (2**bits - 1)
    single = (flat >> torch.arange(bits, dtype=torch.int16, device=flat.device)) & 1
    eights = F.pad(single.reshape(-1), (0, -flat.numel() * bits % _BYTE)).reshape(-1, _BYTE)
    return (eights << torch.arange(_BYTE, dtype=torch.int16, device=flat.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int, bits: int, *, signed: bool = False) -> Tensor:
    """The first `count` integers of what `pack_bits` packed."""
    flat: Tensor = packed.reshape(-1, 1).to(torch.int32)
    step = bits if _BYTE % bits == 0 else 1
    steps = torch.tensor([2**shift for shift in range(0, _BYTE, step)], dtype=torch.int32, device=flat.device)
    flat = (torch.div(flat, steps, rounding_mode="floor") % 2**step).reshape(-1)[: count * bits // step]
    if step < bits:
        weights = torch.tensor([2**shift for shift in range(bits)], dtype=torch.int32, device=flat.device)
        flat = (flat.reshape(-1, bits) * weights).sum(1, dtype=torch.int32)
    if signed:
        flat = flat - 2**bits * (flat >= 2 ** (bits - 1)).to(torch.int32)
    return flat
