"""What a step of each recurrent operator computes, as nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor
from typing_extensions import Self

from tdpass.models.onnx.graph.emitting import Emitter
from tdpass.models.onnx.graph.folding import folded, folded_weight
from tdpass.models.onnx.graph.tensors import FLOAT_TYPES, sizes

Product = Callable[[ir.Value], ir.Value]
Gates = Sequence[int]
_ACTIVATIONS = frozenset({"Tanh", "Relu", "Sigmoid"})


@dataclass(frozen=True)
class Weights:
    """W, R and B of a recurrent node, `[directions, ...]`, as it holds them."""

    w: ir.TensorProtocol
    r: ir.TensorProtocol
    b: ir.TensorProtocol | None

    @classmethod
    def of(cls, node: ir.Node) -> Self:
        """Those of a node that `why_closed` says nothing of."""
        w, r = folded_weight(node.inputs[W]), folded_weight(node.inputs[R])
        return cls(w, r, folded(node.inputs[B]) if len(node.inputs) > B else None)

    @property
    def hidden(self) -> int:
        """Size of the hidden state."""
        return sizes(self.r)[2]


@dataclass(frozen=True)
class Step:
    """The nodes of one step, and what is said of activations and of the limit on what they read."""

    emit: Emitter
    activation: str = "Tanh"
    clip: float = 0.0

    def total(self, pre: ir.Value, own: ir.Value) -> ir.Value:
        """`pre + own`, within the limit where there is one."""
        total = self.emit("Add", pre, own)
        return self.emit.clipped(total, self.clip) if self.clip else total

    def gate(self, function: str, pre: ir.Value, own: ir.Value) -> ir.Value:
        """`function(pre + own)`."""
        return self.emit(function, self.total(pre, own))


@dataclass(frozen=True)
class Cell:
    """A recurrent operator: how many states it has, and its gates in torch's order as places among ONNX's.

    `parts` names the products of the hidden state, each with the gates that it makes.
    """

    states: int
    order: tuple[int, ...]
    usual: tuple[str, ...]
    parts: Mapping[str, Gates]
    step: Callable[[Step, ir.Value, Sequence[Product], Sequence[ir.Value]], Sequence[ir.Value]]

    def in_torch_order(self, stored: Tensor, gates: Gates | None = None) -> Tensor:
        """The gates along the first axis in torch's order; only those at the places `gates`, if given."""
        parts = stored.reshape(len(self.order), -1, *stored.shape[1:])[list(self.order)]
        return (parts if gates is None else parts[list(gates)]).flatten(0, 1)

    def in_onnx_order(self, gates: Tensor) -> Tensor:
        """The other way round, of all gates."""
        back = [self.order.index(place) for place in range(len(self.order))]
        return gates.reshape(len(back), -1, *gates.shape[1:])[back].flatten(0, 1)


def _lstm(
    step: Step, pre: ir.Value, products: Sequence[Product], states: Sequence[ir.Value]
) -> Sequence[ir.Value]:
    """`c' = sigmoid(f) c + sigmoid(i) tanh(g)`, `h' = sigmoid(o) tanh(c')`."""
    emit, (h, c) = step.emit, states
    functions = ("Sigmoid", "Sigmoid", "Tanh", "Sigmoid")
    totals = emit.split(step.total(pre, products[0](h)), 4)
    i, f, g, o = (emit(function, total) for function, total in zip(functions, totals, strict=True))
    c = emit("Add", emit("Mul", f, c), emit("Mul", i, g))
    return emit("Mul", o, emit("Tanh", c)), c


def _gated(
    step: Step, pre: ir.Value, products: Sequence[Product], states: Sequence[ir.Value]
) -> Sequence[ir.Value]:
    """`h' = n + sigmoid(z) (h - n)`, `n = tanh(n_x + N (sigmoid(r) h))`: the new state from the reset one."""
    emit, (h,) = step.emit, states
    (r, z, n), (own_r, own_z) = emit.split(pre, 3), emit.split(products[0](h), 2)
    reset = emit("Mul", step.gate("Sigmoid", r, own_r), h)
    return (_between(step, step.gate("Tanh", n, products[1](reset)), step.gate("Sigmoid", z, own_z), h),)


def _gated_after(
    step: Step, pre: ir.Value, products: Sequence[Product], states: Sequence[ir.Value]
) -> Sequence[ir.Value]:
    """The same with `n = tanh(n_x + sigmoid(r) (N h))`, as torch has it."""
    emit, (h,) = step.emit, states
    (r, z, n), (own_r, own_z, own_n) = emit.split(pre, 3), emit.split(products[0](h), 3)
    reset = emit("Mul", step.gate("Sigmoid", r, own_r), own_n)
    return (_between(step, step.gate("Tanh", n, reset), step.gate("Sigmoid", z, own_z), h),)


def _between(step: Step, fresh: ir.Value, keep: ir.Value, h: ir.Value) -> ir.Value:
    return step.emit("Add", fresh, step.emit("Mul", keep, step.emit("Sub", h, fresh)))


def _plain(
    step: Step, pre: ir.Value, products: Sequence[Product], states: Sequence[ir.Value]
) -> Sequence[ir.Value]:
    """`h' = activation(pre + R h)`."""
    return (step.gate(step.activation, pre, products[0](states[0])),)


LSTM = Cell(2, (0, 2, 3, 1), ("Sigmoid", "Tanh", "Tanh"), {"hidden": range(4)}, _lstm)
_GRU = Cell(1, (1, 0, 2), ("Sigmoid", "Tanh"), {"hidden": (0, 1), "hidden_new": (2,)}, _gated)
GRU_AFTER = Cell(1, (1, 0, 2), ("Sigmoid", "Tanh"), {"hidden": range(3)}, _gated_after)
_RNN = Cell(1, (0,), ("Tanh",), {"hidden": (0,)}, _plain)
X, W, R, B, LENGTHS, H, C, P = range(8)
"""The inputs of a recurrent node: data, weights, biases, lengths of sequences, states, peepholes."""
SINCE = 10
"""The opset from which a Scan has no axis of samples, and there is a ReverseSequence."""
OPERATORS = frozenset({"LSTM", "GRU", "RNN"})


def cell_of(node: ir.Node) -> Cell:
    """The cell of a recurrent node."""
    if node.op_type == "GRU":
        return GRU_AFTER if bool(node.attributes.get_int("linear_before_reset", 0)) else _GRU
    return LSTM if node.op_type == "LSTM" else _RNN


def why_closed(node: ir.Node, opset: int) -> str:
    """Why the products of a recurrent node cannot be layers; empty where they can."""
    given = [*node.inputs, *(None,) * (P + 1 - len(node.inputs))]
    for tensor in (folded(given[W]), folded(given[R])):
        if tensor is None or tensor.dtype not in FLOAT_TYPES:
            return "its weights are computed while it runs, or quantized"
    if given[B] is not None and folded(given[B]) is None:
        return "its bias is computed while it runs"
    if opset < SINCE:
        return f"a Scan over its steps takes opset {SINCE}, this model has {opset}; export it anew"
    if given[P] is not None:
        return "it has peepholes, which are weights from the cell's state to its gates"
    if bool(node.attributes.get_int("layout", 0)):
        return "its first axis is that of samples (layout=1), which ONNX Runtime does not run on the CPU"
    return _why_unusual(node)


def _why_unusual(node: ir.Node) -> str:
    """Why a recurrent node computes what no cell here does; empty where one does."""
    cell, attributes = cell_of(node), node.attributes
    given = activations(node)
    free = cell is _RNN and set(given) <= _ACTIVATIONS
    if given != cell.usual * (len(given) // len(cell.usual)) and not free:
        return f"its activations {', '.join(given)} are not the usual ones"
    return "its input and forget gates are coupled" if bool(attributes.get_int("input_forget", 0)) else ""


def activations(node: ir.Node) -> tuple[str, ...]:
    """The activations of every direction of a recurrent node."""
    count = 2 if node.attributes.get_string("direction", "forward") == "bidirectional" else 1
    return tuple(node.attributes.get_strings("activations", cell_of(node).usual * count))
