"""Recurrent cells whose hidden-to-hidden matrix is a product of two, as parts that one operator computes.

What a step computes is compared with what `tdpass.models.onnx.sites.cells` makes of the same cell, so that only
that is taken for one, whoever wrote the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.graph.emitting import Emitter
from tdpass.models.onnx.graph.folding import folded, number_sources, stored_type
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.stored_integers import Integers, integers_of
from tdpass.models.onnx.graph.tensors import constant, sizes, to_torch
from tdpass.models.onnx.operators.fused_recurrent import LowRankCellOp, Numbers
from tdpass.models.onnx.sites.cells import GRU_AFTER, LSTM, Cell, Step
from tdpass.models.onnx.sites.dynamic_products import DynamicProduct

_UNSAID = frozenset({"num_outputs"})


@dataclass(frozen=True)
class _Template:
    """What one step of a cell computes: from `read` the new states `made`.

    `read` are states and the input's part of the gates.
    """

    read: tuple[ir.Value, ...]
    product: ir.Value
    made: tuple[ir.Value, ...]

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, cell: str, opset: int) -> _Template:
        """That of an LSTM or a GRU."""
        known = _CELLS[cell]
        graph = ir.Graph([], [], nodes=[], opset_imports={"": opset})
        emit = Emitter(graph, FreshNames(ir.Model(graph, ir_version=8)), cell, opset)
        states = tuple(ir.Value(name=f"state_{k}") for k in range(known.states))
        part, product = ir.Value(name="part"), ir.Value(name="product")
        made = known.step(Step(emit), part, [lambda _: product], states)
        return cls((*states, part), product, tuple(made))


_CELLS: Mapping[str, Cell] = {"LSTM": LSTM, "GRU": GRU_AFTER}


@dataclass
class _Match:
    """Whether values of a graph are what a template computes; `found` are those that stand for its own."""

    found: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def __call__(self, wanted: ir.Value, given: ir.Value | None) -> bool:
        node = wanted.producer()
        if given is None or wanted in self.found or node is None:
            return given is not None and self.found.setdefault(wanted, given) is given
        other = given.producer()
        if other is None or other.domain or other.op_type != node.op_type or wanted.index() != given.index():
            return False
        if _said(node) != _said(other) or len(node.inputs) != len(other.inputs):
            return False
        self.found[wanted] = given
        return all(
            value is not None and self(value, held)
            for value, held in zip(node.inputs, other.inputs, strict=True)
        )


def _said(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items() if name not in _UNSAID}


@dataclass(frozen=True)
class _Matrix:
    """A product with a constant `[i, o]`: what it multiplies, the constant, and its numbers or codes.

    `whole` is what these are of. With `rounded` it multiplies whole numbers that it makes of x in every call.
    Numbers of bfloat16 are stored so.
    """

    x: ir.Value | None
    source: ir.Value
    columns: Tensor
    whole: Integers | None = None
    rounded: bool = False

    @property
    def numbers(self) -> Numbers:
        """What the operator's factors are then."""
        if self.whole is None:
            return "bfloat16" if self.columns.dtype == torch.bfloat16 else "float"
        return "int8" if self.rounded else "weight only"

    def inputs(self, constants: Constants) -> list[ir.Value]:
        """As the operator takes it."""
        if self.whole is None:
            return [constants.like(self.source, "factor", self.columns)]
        scale = self.whole.scale_along(1)
        assert scale is not None
        held = constants.like(self.whole.source, "factor", self.columns)
        return [held, constants.like(self.whole.scale_source, "factor", scale)]


@dataclass(frozen=True)
class _Factors:
    """The matrices that the hidden state is multiplied with one after the other, and the bias."""

    v: _Matrix
    u: _Matrix
    bias: ir.Value | None

    def inputs(self, constants: Constants) -> list[ir.Value]:
        """As the operator takes them."""
        gates = self.u.columns.shape[1]
        bias = constants.zeros(self.u.source, gates) if self.bias is None else self.bias
        return [*self.v.inputs(constants), *self.u.inputs(constants), bias]


def _factors_of(product: ir.Value, state: ir.Value) -> _Factors | None:
    """The factors of a product with the hidden state; None where it is no such."""
    value, bias = _without_bias(product)
    outer = _matrix(value)
    inner = None if outer is None else _matrix(outer.x)
    if outer is None or inner is None or inner.x is not state or inner.numbers != outer.numbers:
        return None
    if bias is not None and (constant(bias) is None or bias.shape is None or len(bias.shape) != 1):
        return None
    return _Factors(inner, outer, bias)


def _without_bias(product: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
    """What a constant is added to, and that constant; of a Gemm with bias, its output and the bias."""
    node = product.producer()
    if node is None or node.domain or node.op_type not in ("Add", "Gemm"):
        return product, None
    if node.op_type == "Gemm":
        return product, node.inputs[2] if len(node.inputs) > 2 else None
    bias = next((value for value in node.inputs if constant(value) is not None), None)
    return next((value for value in node.inputs if value is not bias), None), bias


def _matrix(value: ir.Value | None) -> _Matrix | None:
    """The product that makes a value."""
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Mul":
        return _rounded(node)
    kind = node.attributes
    plain = kind.get_float("alpha", 1.0) == kind.get_float("beta", 1.0) == 1.0 and not kind.get_int(
        "transA", 0
    )
    if node.op_type not in ("MatMul", "Gemm") or not plain or node.inputs[1] is None:
        return None
    weight, turned = node.inputs[1], bool(kind.get_int("transB", 0))
    whole = integers_of(weight)
    if whole is not None:
        across = replace(whole, codes=whole.codes.T, scales=whole.scales.T) if turned else whole
        right = across.codes.dim() == 2 and across.scale_along(1) is not None
        return _Matrix(node.inputs[0], weight, across.codes, across) if right else None
    tensor = folded(weight)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(sizes(tensor)) != 2:
        return None
    numbers, source = to_torch(tensor), weight
    if stored_type(weight) == ir.DataType.BFLOAT16 and torch.equal(numbers.bfloat16().float(), numbers):
        numbers, source = numbers.bfloat16(), number_sources(weight)[0]
    return _Matrix(node.inputs[0], source, numbers.T if turned else numbers)


def _rounded(node: ir.Node) -> _Matrix | None:
    """A product of int8 with bytes that are made in every call."""
    product = DynamicProduct.ending(node)
    whole = None if product is None else product.integers
    if product is None or whole is None or whole.codes.dim() != 2:
        return None
    return _Matrix(product.x.value, whole.source, whole.codes, whole, rounded=True)


def low_rank_cells(model: ir.Model) -> Iterator[Part]:
    """The Scans of the main graph that take a sequence through such a cell."""
    for node in model.graph:
        if node.op_type == "Scan" and not node.domain and node.attributes.get_int("num_scan_inputs", 0) == 1:
            for name, cell in _CELLS.items():
                part = _cell(node, name, cell, opset_of(model))
                if part is not None:
                    yield part


def _cell(node: ir.Node, name: str, cell: Cell, opset: int) -> Part | None:
    body, count = node.attributes["body"].as_graph(), cell.states
    ways = [tuple(node.attributes.get_ints(f"scan_{end}_directions", (0,))) for end in ("input", "output")]
    if len(body.inputs) != count + 1 or len(body.outputs) != count + 1 or ways[0] != ways[1]:
        return None
    template = _Template.of(name, opset)
    match = _Match(dict(zip(template.read, body.inputs, strict=True)))
    after, seen = body.outputs[:count], body.outputs[count].producer()
    right = seen is not None and seen.op_type == "Identity" and seen.inputs[0] is after[0]
    if not right or not all(map(match, template.made, after)):
        return None
    factors = _factors_of(match.found[template.product], body.inputs[0])
    if factors is None:
        return None
    (hidden, rank), wide = factors.v.columns.shape, factors.u.columns.shape[1]
    *given, pre = (value for value in node.inputs if value is not None)
    operator = LowRankCellOp(len(cell.order), bool(ways[0][0]), factors.v.numbers)
    if wide != hidden * operator.gates:
        return None
    return Part(
        f"{operator.name} {hidden} {rank}",
        (node.name or name).rpartition("/")[0] or name,
        operator,
        (node,),
        (pre, *given),
        (node.outputs[count], *node.outputs[:count]),
        partial(_inputs, node, factors),
    )


def _inputs(node: ir.Node, factors: _Factors, constants: Constants) -> list[ir.Value]:
    *states, pre = (value for value in node.inputs if value is not None)
    return [pre, *factors.inputs(constants), *states]
