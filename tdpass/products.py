"""Counting multiply-adds: every product of a run, whoever asked for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tdpass.registry import Registry

Count = Callable[..., int]

PRODUCTS: Registry[Count] = Registry("operator with products")
"""Multiply-adds of torch's operators by name, from their output and their arguments.

All others have none or are made of these.
"""

_TORCHS_OWN = frozenset({"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional"})


def counts(*names: str) -> Callable[[Count], Count]:
    """Decorator: the multiply-adds of these operators."""

    def register(count: Count) -> Count:
        for name in names:
            PRODUCTS.add(name, count)
        return count

    return register


def convolution(x: Sequence[int], weight: Sequence[int], y: Sequence[int], transposed: bool = False) -> int:
    """Every output (transposed: input) meets one filter; a group's filters are as deep as the group."""
    return math.prod(x if transposed else y) * math.prod(weight[1:])


def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Scores and their sum of values, `[..., positions, width]`; a mask saves nothing."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def by_rows(x: Sequence[int], *weights: Sequence[int]) -> int:
    """Every weight once per row of `x[..., features]`."""
    return math.prod(x[:-1]) * sum(map(math.prod, weights))


@counts("aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot", "aten._int_mm", "aten._scaled_mm")
def _product(y: Tensor, a: Tensor, b: Tensor, *_: object, **__: object) -> int:
    return a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


@counts(
    "aten.addmm",
    "aten.baddbmm",
    "aten.addbmm",
    "aten.addmv",
    "aten.addmm_",
    "aten.baddbmm_",
    "aten.addbmm_",
    "aten.addmv_",
    "aten._addmm_activation",
)
def _added_product(y: Tensor, added: Tensor, a: Tensor, b: Tensor, *_: object, **__: object) -> int:
    return _product(y, a, b)


@counts("aten.convolution", "aten._convolution", "aten.convolution_overrideable")
def _convolution(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    *_: object,
) -> int:
    return convolution(x.shape, weight.shape, y.shape, transposed)


@counts("aten._trilinear")
def _trilinear(
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    a_axes: Sequence[int],
    b_axes: Sequence[int],
    c_axes: Sequence[int],
    *_: object,
) -> int:
    shapes = [list(tensor.shape) for tensor in (a, b, c)]
    for shape, axes in zip(shapes, (a_axes, b_axes, c_axes), strict=True):
        for axis in sorted(axes):
            shape.insert(axis, 1)
    return math.prod(map(max, zip(*shapes, strict=True)))


@counts(
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
def _attention(y: object, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return attention(query.shape, key.shape, value.shape)


@counts("aten.mkldnn_rnn_layer")
def _onednn_lstm(y: object, x: Tensor, inputs: Tensor, hidden: Tensor, *_: object) -> int:
    return by_rows(x.shape, inputs.shape, hidden.shape)


@counts("aten._cudnn_rnn", "aten.miopen_rnn")
def _cudnn_rnn(y: object, x: Tensor, weights: Sequence[Tensor], *_: object) -> int:
    return by_rows(x.shape, *(weight.shape for weight in weights if weight.dim() > 1))


@dataclass(frozen=True)
class Counted:
    """Multiply-adds of one call for all its samples.

    `unseen` names the operators that cannot be looked into.
    """

    macs: int = 0
    unseen: tuple[str, ...] = ()
    samples: int = 1

    @property
    def per_sample(self) -> int:
        """Multiply-adds per sample, rounded."""
        return round(self.macs / self.samples)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, adds up the products of all operators that run.

    Below torch's functions, so that scripted code counts too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.unseen: dict[str, None] = {}

    def counted(self, samples: int = 1) -> Counted:
        """What was found so far, for a call of that many samples."""
        return Counted(self.macs, tuple(self.unseen), samples)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        if name not in PRODUCTS:
            if func.namespace != "prim":
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if func.namespace not in _TORCHS_OWN:
                self.unseen[name] = None
        result = func(*args, **kwargs)
        if name in PRODUCTS:
            self.macs += PRODUCTS.get(name)(result, *args, **kwargs)
        return result


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what runs inside, layer by layer.

    Torch's fused encoder and what else asks whether it is watched step aside.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _Watching(), Counter() as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _Watching(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*args, **(kwargs or {}))
