"""How an operator is run and compared on a case, natively and by its reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpass.kernels.activation import NAMES, clamp
from tdpass.kernels.base import IMPLEMENTATIONS, Op
from tdpass.kernels.stage import Stage

BOTH = (torch.float32, torch.bfloat16)
# Largest error relative to the largest number of the result; a type that is not listed has none and fails.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
# What operators may end with: every name, and clamps of both kinds.
ENDINGS = (*NAMES, "clamp(-3.5,7.25)", "clamp(-inf,0.5)")
BOUNDS = (
    *(-math.inf, -3.4e38, -1.5e22, -7.25, -0.1, -1e-5, -1.2e-38, -0.0),
    *(0.0, 5e-324, 1e-45, 1e-38, 0.3, 6.0, 1.5e10, 1e300, math.inf),
)
CLAMPS = tuple(dict.fromkeys(clamp(low, high) for low in BOUNDS for high in BOUNDS))
# What the writer never writes, some of which `float` or a C++ stream would take for numbers.
MALFORMED = (
    *("tanh", "", "clamp", "clamp()", "clamp(1)", "clamp(,)", "clamp(1,)", "clamp(,1)", "clamp(1,2,3)"),
    *("clamp(a,b)", "clamp(nan,1)", "clamp(0,nan)", "clamp(1,2", "clamp1,2)", "clamp(1,2))", "Clamp(1,2)"),
    *("clamp( 1,2)", "clamp(1 ,2)", "clamp(1, 2)", "clamp(1,2 )", "clamp(1_0,20)", "clamp(0x1,2)"),
    *("clamp(infinity,2)", "clamp(-Inf,2)", "clamp(+inf,2)", "clamp(1e999,2)", "clamp(1,2f)", "clamp(1e,2)"),
    *("clamp(--1,2)", "clamp(\uff11,2)", "relu ", "RELU", "clamp(1;2)"),
)
# What has the type of the input; everything else of an operator, weights and biases, is float32.
ACTIVATIONS = frozenset({"x", "residual", "pre", "h0", "c0"})


@dataclass(frozen=True)
class Case:
    """Arguments of an operator, float32 or whole numbers, and the input types it is run in natively.

    `tolerance` is the error relative to the largest number of the result, where it is not that of the type.
    """

    name: str
    args: tuple[Any, ...]
    dtypes: tuple[torch.dtype, ...] = BOTH
    tolerance: float | None = None

    def allowed(self, dtype: torch.dtype) -> float:
        """The largest error in that type."""
        return TOLERANCE[dtype] if self.tolerance is None else self.tolerance


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def arguments(op: Op, case: Case, dtype: torch.dtype) -> list[Any]:
    """The arguments with activations of that type."""
    names = [argument.name for argument in op.call._schema.arguments]
    return [
        arg.to(dtype) if name in ACTIVATIONS and is_floating(arg) else arg
        for name, arg in zip(names, case.args, strict=True)
    ]


def is_floating(arg: object) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point()


def map_tensors(function: Callable[[Tensor], Tensor], args: Sequence[Any]) -> list[Any]:
    """The arguments with every tensor replaced."""
    return [
        function(arg)
        if isinstance(arg, Tensor)
        else [function(each) for each in arg]
        if is_tensors(arg)
        else arg
        for arg in args
    ]


def is_tensors(arg: object) -> bool:
    return isinstance(arg, list | tuple) and len(arg) > 0 and all(isinstance(each, Tensor) for each in arg)


def exact(op: Op, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The reference in float64 on these very numbers."""
    return as_tuple(
        op.reference(
            *map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, args)
        )
    )


def run_native(op: Op, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The native implementation, which must not pass the case on to the reference."""
    result = IMPLEMENTATIONS.get((op.name, "cpu"), op.reference)(*args)
    assert result is not NotImplemented, f"{op.name} has no native implementation for this case"
    return as_tuple(result)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_close(got: Sequence[Tensor], wanted: Sequence[Tensor], allowed: float) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        if one.numel():
            error = float((one.double() - other).abs().max() / other.abs().max().clamp_min(1e-3))
            assert error <= allowed, f"relative error {error:.2e}"


# Geometries beyond a bottleneck: steps, dilation, uneven padding, groups of odd and even size, every channel
# by itself.
CHAINS = {
    "spatial": (
        Stage(8, 6, 1, (3, 1), (2, 1), (1, 0), (1, 0)),
        Stage(6, 8, 1, (1, 3), (1, 2), (0, 1), (0, 1)),
    ),
    "cp": (
        Stage(5, 19),
        Stage(19, 19, 19, (5, 1), (1, 1), (2, 0), (2, 0)),
        Stage(19, 19, 19, (1, 3), (1, 1), (0, 0), (0, 2)),
        Stage(19, 4),
    ),
    "grouped": (Stage(8, 12, 2, (3, 3), (1, 1), (2, 2), (2, 2), (2, 2)), Stage(12, 21, 3), Stage(21, 6, 3)),
    "depthwise": (Stage(17, 17, 17, (3, 3), (2, 2), (1, 1), (1, 1)),),
    "wide": (Stage(40, 70, 1, (2, 3), (1, 1), (1, 0), (0, 2)),),
}
