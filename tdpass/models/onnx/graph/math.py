"""Torch functions for element-wise operators, comparisons, reductions and products."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.models.onnx.graph.functions import (
    FUNCTIONS,
    NotServedError,
    Operator,
    TorchFunction,
    numbers,
    serves,
)

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Sign": torch.sign, "Reciprocal": torch.reciprocal,
    "Sqrt": torch.sqrt, "Exp": torch.exp, "Log": torch.log,
    "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Erf": torch.erf,
    "Not": torch.logical_not, "IsNaN": torch.isnan,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Softplus": F.softplus,
    "Softsign": F.softsign, "HardSwish": F.hardswish, "Mish": F.mish,
    "Identity": lambda x: x,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Equal": torch.eq, "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "Less": torch.lt,
    "LessOrEqual": torch.le, "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "MatMul": torch.matmul,
}  # fmt: skip
_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}


def _unary(function: Callable[[Tensor], Tensor]) -> TorchFunction:
    return lambda _op, x: function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> TorchFunction:
    return lambda _op, a, b: function(a, b)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> TorchFunction:
    return lambda _op, *inputs: reduce(function, inputs)


for _name, _one in _UNARY.items():
    FUNCTIONS.add(_name, _unary(_one))
for _name, _two in _BINARY.items():
    FUNCTIONS.add(_name, _binary(_two))
for _name, _many in _VARIADIC.items():
    FUNCTIONS.add(_name, _variadic(_many))


@serves("Mean")
def _mean(_op: Operator, *inputs: Tensor) -> Tensor:
    return reduce(torch.add, inputs) / len(inputs)


@serves("Div")
def _div(_op: Operator, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@serves("Pow")
def _pow(_op: Operator, a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


@serves("Mod")
def _mod(op: Operator, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if op.integer("fmod") else torch.remainder(a, b)


@serves("Clip")
def _clip(op: Operator, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    # As numbers, so that a clip reads one tensor only, like the ReLU6 it mostly is.
    least = low.item() if low is not None else op.number("min", float("-inf"))
    most = high.item() if high is not None else op.number("max", float("inf"))
    return torch.clamp(x, least, most)


@serves("Where")
def _where(_op: Operator, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@serves("LeakyRelu")
def _leaky_relu(op: Operator, x: Tensor) -> Tensor:
    return F.leaky_relu(x, op.number("alpha", 0.01))


@serves("Elu")
def _elu(op: Operator, x: Tensor) -> Tensor:
    return F.elu(x, op.number("alpha", 1.0))


@serves("Celu")
def _celu(op: Operator, x: Tensor) -> Tensor:
    return F.celu(x, op.number("alpha", 1.0))


@serves("Selu")
def _selu(op: Operator, x: Tensor) -> Tensor:
    alpha, gamma = op.number("alpha", 1.6732632), op.number("gamma", 1.0507010)
    return gamma * (torch.clamp(x, min=0) + torch.clamp(alpha * torch.expm1(x), max=0))


@serves("PRelu")
def _prelu(_op: Operator, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


@serves("ThresholdedRelu")
def _thresholded_relu(op: Operator, x: Tensor) -> Tensor:
    return F.threshold(x, op.number("alpha", 1.0), 0.0)


@serves("HardSigmoid")
def _hard_sigmoid(op: Operator, x: Tensor) -> Tensor:
    return torch.clamp(op.number("alpha", 0.2) * x + op.number("beta", 0.5), 0, 1)


@serves("Gelu", "com.microsoft::Gelu")
def _gelu(op: Operator, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=op.string("approximate", "none"))


@serves("com.microsoft::BiasGelu")
def _bias_gelu(_op: Operator, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@serves("com.microsoft::FastGelu")
def _fast_gelu(_op: Operator, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@serves("com.microsoft::QuickGelu")
def _quick_gelu(op: Operator, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.number("alpha", 1.702) * x)


@serves("Swish")
def _swish(op: Operator, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.number("alpha", 1.0) * x)


def _softmax(function: Callable[[Tensor, int], Tensor]) -> TorchFunction:
    def run(op: Operator, x: Tensor) -> Tensor:
        if op.opset >= 13:
            return function(x, op.integer("axis", -1))
        axis = op.integer("axis", 1) % max(x.dim(), 1)
        return function(x, -1) if axis == x.dim() - 1 else function(x.flatten(axis), -1).reshape(x.shape)

    return run


FUNCTIONS.add("Softmax", _softmax(torch.softmax))
FUNCTIONS.add("LogSoftmax", _softmax(torch.log_softmax))


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: torch.sum(x, axes, keepdim=keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: torch.mean(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: torch.sum(torch.abs(x), axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keepdim=keep)),
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x * x, axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(torch.sum(x, axes, keepdim=keep)),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> TorchFunction:
    def run(op: Operator, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = op.integers_or("axes", axes)
        if not chosen:
            if op.integer("noop_with_empty_axes"):
                return x
            chosen = list(range(x.dim()))
        return function(x, chosen, bool(op.integer("keepdims", 1))) if chosen else x

    return run


for _name, _reduce in _REDUCTIONS.items():
    FUNCTIONS.add(_name, _reduction(_reduce))


def _extremum(function: Callable[..., Tensor]) -> TorchFunction:
    def run(op: Operator, x: Tensor) -> Tensor:
        if op.integer("select_last_index"):
            raise NotServedError
        return function(x, dim=op.integer("axis"), keepdim=bool(op.integer("keepdims", 1)))

    return run


FUNCTIONS.add("ArgMax", _extremum(torch.argmax))
FUNCTIONS.add("ArgMin", _extremum(torch.argmin))


@serves("TopK")
def _top_k(op: Operator, x: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    k = op.integer("k") if count is None else numbers(count)[0]
    values, indices = torch.topk(
        x, k, op.integer("axis", -1), bool(op.integer("largest", 1)), bool(op.integer("sorted", 1))
    )
    return values, indices


@serves("Gemm")
def _gemm(op: Operator, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    y = torch.matmul(a.T if op.integer("transA") else a, b.T if op.integer("transB") else b)
    y = y if op.number("alpha", 1.0) == 1 else op.number("alpha", 1.0) * y
    return y if c is None else torch.add(y, c if op.number("beta", 1.0) == 1 else op.number("beta", 1.0) * c)


@serves("Einsum")
def _einsum(op: Operator, *operands: Tensor) -> Tensor:
    return torch.einsum(op.string("equation"), *operands)


@serves("CumSum")
def _cumulative_sum(op: Operator, x: Tensor, axis: Tensor) -> Tensor:
    dim, reverse, exclusive = numbers(axis)[0], op.integer("reverse"), op.integer("exclusive")
    y = torch.flip(x, [dim]) if reverse else x
    total = torch.cumsum(y, dim, dtype=x.dtype)
    total = total - y if exclusive else total
    return torch.flip(total, [dim]) if reverse else total
