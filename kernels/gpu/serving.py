"""What every operator on CUDA needs: whether kernels serve it, their entry functions, weights for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.kernels.base import Implementation
from tdpass.kernels.gpu.device import available

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def covered(*dtypes: torch.dtype) -> Callable[[Callable[..., Any]], Implementation]:
    """Decorator: leave to the reference what the kernels cannot serve here or say that they do not support.

    That is x of other types, empty x, and a residual in floating point of another type than x.
    """

    def serve(function: Callable[..., Any]) -> Implementation:
        place = list(inspect.signature(function).parameters).index("residual")

        @wraps(function)
        def run(*args: Any) -> Any:
            x, residual = args[0], args[place]
            if not available() or x.dtype not in dtypes or x.numel() == 0 or _differs(x, residual):
                return NotImplemented
            try:
                return function(*args)
            except UnsupportedError:
                return NotImplemented

        return run

    return serve


def _differs(x: Tensor, residual: Tensor | None) -> bool:
    both = residual is not None and residual.is_floating_point() and x.is_floating_point()
    return both and residual is not None and residual.dtype != x.dtype


def kernel(name: str, part: str = "") -> Any:
    """The entry function of that name, or a part of its file; the first use imports triton."""
    return getattr(import_module(f"tdpass.kernels.gpu.{name}"), part or name)


def kept(packed: Tensor, form: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    """What the kernels read instead of a packed weight; see `weights.kept`."""
    made: Tensor = import_module("tdpass.kernels.gpu.weights").kept([packed], form, make)
    return made


def spaced(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with rows apart by a multiple of 16 numbers; see `weights.spaced`."""
    made: Tensor = import_module("tdpass.kernels.gpu.weights").spaced(weight, dtype)
    return made
