"""A tensor whose numbers are made where they are read; its type and size are known before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Size, Tensor
from torch.utils._pytree import tree_map_only

_PROPERTIES = (
    "dtype",
    "shape",
    "device",
    "layout",
    "ndim",
    "is_cuda",
    "is_sparse",
    "is_quantized",
    "is_meta",
    "requires_grad",
)
_KNOWN = frozenset(getattr(Tensor, name).__get__ for name in _PROPERTIES) | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
}


class Deferred(Tensor):
    """What `make()` answers with, made anew at each read of its numbers.

    Its type, size and device cost nothing. Libraries ask a layer's weight for its type at every call (T5
    casts what it multiplies to it): the dense weight of a factored layer must not be multiplied out for that.
    """

    _make: Callable[[], Tensor]

    @staticmethod
    def of(
        make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Deferred:
        """The tensor of that shape, type and device which `make` answers with."""
        wrapper = cast(Any, Tensor)._make_wrapper_subclass
        deferred: Deferred = wrapper(Deferred, Size(shape), dtype=dtype, device=device, requires_grad=False)
        deferred._make = make
        return deferred

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        return func(*_made(args), **_made(dict(kwargs or {})))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without types
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*_made(args), **_made(dict(kwargs or {})))


def _made(values: Any) -> Any:
    return tree_map_only(Deferred, lambda deferred: deferred._make(), values)
