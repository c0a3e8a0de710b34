"""Which nodes hold a weight that can be replaced: one small matcher per operator, in a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from tdpass.errors import UnsupportedError
from tdpass.kinds import KINDS, PRODUCT, LayerKind
from tdpass.models.onnx.graph.folding import REARRANGING, folded, numbers_of
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import FLOAT_TYPES, PARAMETER_TYPES, constant, sizes
from tdpass.models.onnx.sites.cells import OPERATORS, SINCE, R, W, why_closed
from tdpass.models.onnx.sites.dynamic_products import DYNAMIC, is_dynamic
from tdpass.models.onnx.sites.weight_use import Slot, WeightUse
from tdpass.registry import Registry


class DeclinedNode(Exception):  # noqa: N818 - declining is normal, not an error
    """The node holds a weight but must be left alone.

    Carries the weight's value and the reason in one sentence.
    """

    def __init__(self, weight: ir.Value, reason: str) -> None:
        super().__init__(reason)
        self.weight = weight
        self.reason = reason


class Matcher(Protocol):
    """Recognizes the use of a weight by one kind of operator."""

    def match(self, node: ir.Node, shapes: Shapes, /) -> WeightUse | None:
        """The use, or None where the node holds no weight.

        Raises `DeclinedNode` where it holds one that must stay.
        """


_QUANTIZED = (
    "the weight is quantized; compress the floating-point model, or what tdpass.dequantize "
    "makes of this one, then quantize it"
)
_INTEGERS = (
    "the weight is quantized for an operator that tdpass.dequantize makes no numbers of; compress the "
    "floating-point model, then quantize it"
)
_FOLD = (
    "the weight is computed from a constant at run time; fold constants first (onnxscript.optimizer.optimize)"
)
_SEVERAL = (
    "it holds several matrices as one weight; export the model with a linear layer of its own "
    "for each (experts of a mixture too)"
)
_UNFOLDED = {"DequantizeLinear": _QUANTIZED}
MATCHERS: Registry[Matcher] = Registry("ONNX matcher")


def operator_name(node: ir.Node) -> str:
    """`Conv`, or `com.microsoft::FusedConv` outside the standard domain."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def matches(*operators: str) -> Callable[[type[Matcher]], type[Matcher]]:
    """Class decorator: use the matcher for these operators."""

    def add(cls: type[Matcher]) -> type[Matcher]:
        for operator in operators:
            MATCHERS.add(operator, cls())
        return cls

    return add


def held_weight(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    """The floating-point constant at an input; None where that input is computed from activations.

    Raises `DeclinedNode` for what is a weight but not a constant one can replace.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    tensor = numbers_of(value)
    if tensor is None:
        if value.is_initializer():
            raise DeclinedNode(
                value,
                "the weight is also a graph input, which a caller may override; remove it from the inputs "
                "to make it constant",
            )
        producer = value.producer()
        if producer is not None and _is_matrix(value):
            raise DeclinedNode(value, _UNFOLDED.get(producer.op_type, _FOLD))
        return None
    if tensor.dtype not in FLOAT_TYPES:
        raise DeclinedNode(value, f"the weight is of type {tensor.dtype.name}, not floating-point")
    if 0 in sizes(tensor):
        raise DeclinedNode(value, "the weight is empty")
    return tensor


@dataclass(frozen=True)
class WindowMatcher:
    """The operator of a layer kind that reads input, weight and bias."""

    kind: LayerKind

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        tensor = held_weight(node, 1)
        if tensor is None:
            return None
        weight, shape = Slot(node, 1), sizes(tensor)
        known = shapes.of(Slot(node, 0).value)
        size = (None,) * (len(shape) - 2) if known is None else known[2:]
        try:
            window = self.kind.window(node.attributes, shape, size)
        except UnsupportedError as error:
            raise DeclinedNode(weight.value, str(error)) from None
        bias = Slot(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        if bias is not None and numbers_of(bias.value) is None:
            raise DeclinedNode(weight.value, "the bias is not a constant")
        return WeightUse(Slot(node, 0), weight, self.kind.name, window=window, bias=bias)


def operands_of(node: ir.Node) -> tuple[ir.TensorProtocol, Slot, Slot] | None:
    """The constant operand of a product, the right one where both are, its place, and that of the data.

    None where none is held.
    """
    for place in (1, 0):
        tensor = held_weight(node, place)
        if tensor is not None:
            weight, data = Slot(node, place), Slot(node, 1 - place)
            if folded(data.value) is not None and len(weight.value.uses()) < 2:
                raise DeclinedNode(weight.value, "both operands are constants; fold them first")
            return tensor, weight, data
    return None


@matches("Gemm")
class GemmMatcher:
    """`alpha A' B' + beta C` with a constant on either side, in every transposition."""

    def match(self, node: ir.Node, _shapes: Shapes) -> WeightUse | None:
        attributes = node.attributes
        alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
        operands = operands_of(node)
        if operands is None:
            return None
        tensor, weight, data = operands
        right = weight.index == 1
        flips = bool(attributes.get_int("transA", 0)), bool(attributes.get_int("transB", 0))
        if right:
            transposed, swapped = not flips[1], flips[0]
        else:
            transposed, swapped = flips[0], not flips[1]
        channels = sizes(tensor)[1 if transposed else 0]
        bias, addend = self._third(node, channels, on_rows=not right, beta=beta)
        swap = (1, 0)
        return WeightUse(
            data, weight, PRODUCT, transposed, alpha, swap_in=swap if swapped else None,
            swap_out=None if right else swap,
            bias=bias, bias_scale=beta if bias else 1.0, addend=addend, addend_scale=beta if addend else 1.0,
        )  # fmt: skip

    @staticmethod
    def _third(node: ir.Node, channels: int, on_rows: bool, beta: float) -> tuple[Slot | None, Slot | None]:
        """C as the bias where it is a constant with one number per output channel, else as an addend."""
        if len(node.inputs) < 3 or node.inputs[2] is None or beta == 0:
            return None, None
        slot = Slot(node, 2)
        tensor = numbers_of(slot.value)
        fitting = {(channels, 1)} if on_rows else {(channels,), (1, channels)}
        return (slot, None) if tensor is not None and sizes(tensor) in fitting else (None, slot)


@matches("MatMul")
class MatMulMatcher:
    """`x @ W` and `W @ x` with a constant matrix; a constant added right after is the bias."""

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        operands = operands_of(node)
        if operands is None:
            return None
        tensor, weight, data = operands
        right = weight.index == 1
        shape, rank = sizes(tensor), shapes.rank(data.value)
        if len(shape) != 2:
            raise DeclinedNode(weight.value, "a vector has nothing to factor" if len(shape) < 2 else _SEVERAL)
        if right:
            return self._with_add(WeightUse(data, weight, PRODUCT, transposed=True), shape[1], rank)
        if rank is None:
            raise DeclinedNode(
                weight.value,
                "the weight is the left operand and the rank of the right one is unknown; run shape "
                "inference first",
            )
        if rank == 1:
            return self._with_add(WeightUse(data, weight, PRODUCT), shape[0], 1)
        swap = (*range(rank - 2), rank - 1, rank - 2)
        return self._with_add(WeightUse(data, weight, PRODUCT, swap_in=swap, swap_out=swap), shape[0], rank)

    @staticmethod
    def _with_add(use: WeightUse, channels: int, rank: int | None) -> WeightUse:
        product = use.node.outputs[0]
        consumers = product.uses()
        if len(consumers) != 1 or product.is_graph_output():
            return use
        ((add, index),) = consumers
        if add.op_type != "Add" or add.domain or add.graph is not use.node.graph:
            return use
        slot = Slot(add, 1 - index)
        tensor = numbers_of(slot.value)
        if tensor is None:
            return use
        shape = sizes(tensor)
        wanted = (channels, 1) if use.swap_out is not None else (channels,)
        padding_axes = len(shape) - len(wanted)
        # Leading ones must not raise the rank of the sum above that of the product.
        broadcasts = padding_axes == 0 or (rank is not None and len(shape) <= rank)
        if (
            padding_axes < 0
            or not broadcasts
            or shape[padding_axes:] != wanted
            or any(size != 1 for size in shape[:padding_axes])
        ):
            return use
        return WeightUse(
            use.input,
            use.weight,
            PRODUCT,
            use.transposed,
            swap_in=use.swap_in,
            swap_out=use.swap_out,
            bias=slot,
            absorbed=add,
        )


@dataclass(frozen=True)
class Left:
    """An operator whose weights, at these inputs, are left alone for a reason."""

    inputs: tuple[int, ...]
    reason: str

    def match(self, node: ir.Node, _shapes: Shapes) -> WeightUse | None:
        for index in self.inputs:
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and _is_matrix(value):
                raise DeclinedNode(value, self.reason)
        return None


def _is_matrix(value: ir.Value | None) -> bool:
    """Whether the value is stored, plainly or quantized, and has two or more axes to factor."""
    if value is None:
        return False
    tensor = value.const_value if value.is_initializer() else constant(value)
    if tensor is not None:
        return tensor.dtype in PARAMETER_TYPES and sum(size != 1 for size in sizes(tensor)) >= 2
    producer = value.producer()
    known = producer is not None and (producer.op_type in _UNFOLDED or producer.op_type in REARRANGING)
    return known and producer is not None and _is_matrix(next(iter(producer.inputs), None))


@matches("Gather")
class LookupMatcher:
    """Rows of a constant matrix; those that are always the same are no lookup."""

    def match(self, node: ir.Node, _shapes: Shapes) -> WeightUse | None:
        if constant(node.inputs[1]) is not None or not _is_matrix(node.inputs[0]):
            return None
        tensor, table = held_weight(node, 0), Slot(node, 0)
        if tensor is None:
            return None
        if len(sizes(tensor)) != 2 or node.attributes.get_int("axis", 0) != 0:
            raise DeclinedNode(table.value, "it is looked up along another axis than its rows")
        return WeightUse(Slot(node, 1), table, PRODUCT, reads_rows=True)


@matches(*sorted(OPERATORS))
class RecurrentMatcher:
    """A node whose products were not made layers of their own when the model was opened."""

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        return Left((W, R), why_closed(node, SINCE) or f"its steps take opset {SINCE}").match(node, shapes)


@dataclass(frozen=True)
class OfBytes:
    """A product that may make bytes of what it reads by its range in every call."""

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        return Left((1,), _QUANTIZED if is_dynamic(node) else _INTEGERS).match(node, shapes)


_LEFT: dict[str, Matcher] = {
    "DeformConv": Left((1,), "deformable convolutions are not supported"),
    **dict.fromkeys(DYNAMIC, OfBytes()),
    "com.microsoft::DynamicQuantizeLSTM": Left((1, 2), _QUANTIZED),
}
for _operator, _matcher in _LEFT.items():
    MATCHERS.add(_operator, _matcher)
for _kind in KINDS:
    if _kind.operator:
        MATCHERS.add(_kind.operator, WindowMatcher(_kind))


@dataclass(frozen=True)
class OtherDomain:
    """Contrib operators and model-local functions: a constant matrix they read is held, never replaced."""

    def match(self, node: ir.Node, _shapes: Shapes) -> WeightUse | None:
        for value in node.inputs:
            if value is not None and _is_matrix(value):
                raise DeclinedNode(value, f"operator {operator_name(node)} is not one that tdpass rewrites")
        return None


def matcher_for(node: ir.Node) -> Matcher | None:
    """The matcher of a node's operator, if it is one that can hold weights."""
    name = operator_name(node)
    if name in MATCHERS:
        return MATCHERS.get(name)
    return OtherDomain() if node.domain else None
