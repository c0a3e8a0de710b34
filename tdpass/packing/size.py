"""How small packed tensors are: as the literature counts it, and as they lie in the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tdpass.documents import Count
from tdpass.packing.block import pack
from tdpass.packing.floats import DTYPES
from tdpass.packing.header import read_header


@dataclass(frozen=True)
class StoredSize:
    """Sizes of all packed tensors together; the literature's figure leaves out where the survivors are.

    `weights` elements of which `survivors` are not zero; `value_bits` = sum over tensors of survivors *
    max(1, ceil(log2(levels))), the type's width for raw values; `weight_data_bytes` = value_bits / 8, without
    positions, tables and headers; `true_bytes` everything in the blocks; `dense_bytes` the same tensors
    plain; `plain_bytes` the floating-point tensors that are not packed.
    """

    weights: Count = 0
    survivors: Count = 0
    value_bits: Count = 0
    weight_data_bytes: Count = 0
    true_bytes: Count = 0
    dense_bytes: Count = 0
    plain_bytes: Count = 0


def size_of_blocks(blocks: Iterable[tuple[str, bytes]], plain_bytes: int = 0) -> StoredSize:
    """The sizes of named blocks; raises `InvalidModelError` for a damaged one."""
    weights = survivors = value_bits = true_bytes = dense_bytes = 0
    for name, block in blocks:
        header, _, _ = read_header(block, name)
        width = max(1, math.ceil(math.log2(header.levels))) if header.levels else 8 * header.dtype.itemsize
        weights += header.elements
        survivors += header.survivors
        value_bits += header.survivors * width
        true_bytes += len(block)
        dense_bytes += header.elements * header.dtype.itemsize
    return StoredSize(
        weights, survivors, value_bits, math.ceil(value_bits / 8), true_bytes, dense_bytes, plain_bytes
    )


def stored_size(tensors: Mapping[str, Tensor] | nn.Module) -> StoredSize:
    """The sizes that saving would reach; tensors that are shared count once."""
    named = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    distinct = {
        (t.data_ptr(), t.shape, t.stride()) if t.numel() else name: (name, t)
        for name, t in named.items()
        if t.dtype in DTYPES
    }
    packed = [(name, tensor, pack(tensor)) for name, tensor in distinct.values()]
    plain = sum(tensor.numel() * tensor.element_size() for _, tensor, block in packed if block is None)
    return size_of_blocks([(name, block) for name, _, block in packed if block is not None], plain)
