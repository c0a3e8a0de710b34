"""Weights as the kernels read them, made once per weight and kept while it lives unchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KEPT: Any = WeakTensorKeyDictionary()
_STEP = 16  # Triton vectorizes where it knows a stride to be a multiple of 16


def kept(sources: Sequence[Tensor], form: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` makes of `sources`, kept with the first.

    Made again where one of them is another tensor or was written to since. `make` must not return a view of
    the first, which would then never be freed.
    """
    if any(source.is_inference() for source in sources):  # nothing tells when they are written to
        return make()
    stamp = tuple((source.data_ptr(), source._version) for source in sources)  # noqa: SLF001
    forms: dict[Hashable, tuple[Hashable, Tensor]] = _KEPT.get(sources[0], {})
    name = (form, *sources[1:])  # tensors are equal as keys where they are the same
    seen, found = forms.get(name, (None, None))
    if found is not None and seen == stamp:
        return found
    with torch.no_grad():
        made = make()
    if not capturing(sources[0]):  # memory made under capture belongs to the graph
        _KEPT[sources[0]] = {**forms, name: (stamp, made)}
    return made


def capturing(x: Tensor) -> bool:
    """Whether work on the device of x goes into a CUDA graph just now."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight[o, i]` in `dtype`, its rows apart by a multiple of 16 numbers.

    The weight itself where it is so already.
    """
    if weight.dtype == dtype and weight.stride(1) == 1 and weight.stride(0) % _STEP == 0:
        return weight
    return kept([weight], ("rows", dtype), lambda: spaced(weight, dtype))


def empty_rows(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty matrix whose rows lie apart by a multiple of 16 numbers."""
    return torch.empty((rows, -(-columns // _STEP) * _STEP), dtype=dtype, device=like.device)[:, :columns]


def spaced(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `weight[o, i]` in `dtype`, its rows apart by a multiple of 16 numbers."""
    made = empty_rows(weight.shape[0], weight.shape[1], weight, dtype)
    made.copy_(weight)
    return made
