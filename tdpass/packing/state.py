"""Packed blocks among the tensors of a safetensors file, as uint8 under the tensor's name and a suffix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tdpass.errors import InvalidModelError, UsageError
from tdpass.packing.block import pack
from tdpass.packing.size import StoredSize, size_of_blocks

SUFFIX = ".tdpass_packed"
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def packed_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they go into the file, those worth it packed.

    Raises `UsageError` for a name that ends with the suffix.
    """
    taken = [name for name in tensors if name.endswith(SUFFIX)]
    if taken:
        raise UsageError(
            f"the model names a tensor {taken[0]!r}; names that end with {SUFFIX!r} are kept for packed "
            "tensors, so give it another"
        )
    written = {}
    for name, tensor in tensors.items():
        block = pack(tensor)
        if block is None:
            written[name] = tensor
        else:
            written[name + SUFFIX] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
    return written


def blocks_in(file: Any) -> dict[str, bytes]:
    """Blocks of an open safetensors file by the names of their tensors.

    Raises `InvalidModelError` for one that is no bytes.
    """
    blocks = {}
    for name in file.keys():  # noqa: SIM118 - it is no dict
        if name.endswith(SUFFIX):
            held = file.get_tensor(name)
            if held.dtype is not torch.uint8:
                raise InvalidModelError(
                    f"the packed tensor {name!r} holds {held.dtype} instead of bytes; write the file again "
                    "with Artifact.save"
                )
            blocks[name.removesuffix(SUFFIX)] = held.numpy().tobytes()
    return blocks


def stored_in(path: Path) -> StoredSize | None:
    """What the packed tensors of a file take; None where it has none."""
    with safe_open(path, framework="pt") as file:
        blocks = blocks_in(file)
        # what safetensors opens is no dict
        plain = [file.get_slice(name) for name in file.keys() if not name.endswith(SUFFIX)]  # noqa: SIM118
        left = sum(math.prod(tensor.get_shape()) * _FLOATS.get(tensor.get_dtype(), 0) for tensor in plain)
    return size_of_blocks(blocks.items(), left) if blocks else None
