"""Digests of tensors and texts by content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def digest(*parts: Tensor | str | None) -> str:
    """A hash of tensors and texts by content."""
    return digest_of(parts)


def digest_of(parts: Iterable[Tensor | str | None]) -> str:
    """The same of parts that come one after another."""
    state = hashlib.blake2b(digest_size=20)
    for part in parts:
        if part is None:
            state.update(b"-")
        elif isinstance(part, str):
            state.update(f"{len(part)}:{part}".encode())
        else:
            tensor = part.detach().cpu().contiguous()
            state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            state.update(
                np.ascontiguousarray(tensor.reshape(-1).view(torch.uint8).numpy()).data
                if tensor.numel()
                else b""
            )
        state.update(b"|")
    return state.hexdigest()
