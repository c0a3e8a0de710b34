"""Activations as exporters write them, and who reads a value."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from tdpass.kernels.activation import clamp
from tdpass.models.onnx.graph.tensors import constant, sizes, to_torch

_ROOT_HALF = math.sqrt(0.5)


def activation_after(y: ir.Value) -> tuple[str, list[ir.Node]]:
    """The activation that alone reads the value, and its nodes in order.

    "identity" and none where there is no such.
    """
    for name, find in (("silu", _silu), ("gelu", _gelu)):
        found = find(y)
        if found:
            return name, found
    return _cuts(y)


def sole_reader(value: ir.Value, *operators: str) -> ir.Node | None:
    """The one node that reads the value, once, in the same graph.

    None where its operator is not one of those given.
    """
    uses = value.uses()
    producer = value.producer()
    if len(uses) != 1 or value.is_graph_output() or producer is None:
        return None
    ((node, _),) = uses
    fits = node.graph is producer.graph and (
        not operators or (node.op_type in operators and node.domain in ("", "com.microsoft"))
    )
    return node if fits else None


def other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a sum or product that is not this one."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _cuts(y: ir.Value) -> tuple[str, list[ir.Node]]:
    """The clamp that all nodes in a row make which cut at constants, the first of which alone reads y."""
    low, high = -math.inf, math.inf
    nodes: list[ir.Node] = []
    while True:
        node = sole_reader(y, "Relu", "Clip", "Max", "Min")
        ends = None if node is None else _ends(node, y)
        if node is None or ends is None:
            return clamp(low, high), nodes
        low, high = (min(max(end, ends[0]), ends[1]) for end in (low, high))
        nodes.append(node)
        y = node.outputs[0]


def _ends(node: ir.Node, y: ir.Value) -> tuple[float, float] | None:
    """Where a node cuts y; bounds are attributes of Clip up to opset 10."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type == "Clip":
        given = [*node.inputs[1:], None, None][:2]
        infinite = zip(("min", "max"), (-math.inf, math.inf), strict=True)
        rest = [node.attributes.get_float(name, end) for name, end in infinite]
        pairs = zip(given, rest, strict=True)
        low, high = (end if bound is None else _number(bound) for bound, end in pairs)
    else:
        bound = _number(other(node, y)) if len(node.inputs) == 2 else None
        low, high = (bound, math.inf) if node.op_type == "Max" else (-math.inf, bound)
    return None if low is None or high is None or math.isnan(low + high) else (low, high)


def _silu(y: ir.Value) -> list[ir.Node]:
    swish = sole_reader(y, "Swish")
    if swish is not None:
        return [swish] if swish.attributes.get_float("alpha", 1.0) == 1.0 else []
    gates = [node for node in _readers(y, 2) if node.op_type == "Sigmoid" and not node.domain]
    product = sole_reader(gates[0].outputs[0], "Mul") if len(gates) == 1 else None
    return (
        [gates[0], product] if product is not None and set(product.inputs) == {y, gates[0].outputs[0]} else []
    )


def _gelu(y: ir.Value) -> list[ir.Node]:
    """One node, or `y (1 + erf(y / sqrt 2)) / 2` as exporters write it."""
    node = sole_reader(y, "Gelu")
    if node is not None:
        return [node] if node.attributes.get_string("approximate", "none") == "none" else []
    scale = next((node for node in _readers(y, 2) if _scales(node, y, _ROOT_HALF)), None)
    erf = None if scale is None else sole_reader(scale.outputs[0], "Erf")
    shift = None if erf is None else sole_reader(erf.outputs[0], "Add")
    if scale is None or erf is None or shift is None or not _is_number(other(shift, erf.outputs[0]), 1.0):
        return []
    product = sole_reader(shift.outputs[0], "Mul")
    if product is None or other(product, shift.outputs[0]) is not y:
        return []
    half = sole_reader(product.outputs[0], "Mul", "Div")
    return (
        [scale, erf, shift, product, half]
        if half is not None and _scales(half, product.outputs[0], 0.5)
        else []
    )


def _readers(value: ir.Value, count: int) -> Iterator[ir.Node]:
    """The nodes that read the value, if there are that many readings and all are in its graph."""
    producer, uses = value.producer(), value.uses()
    if (
        producer is not None
        and len(uses) == count
        and not value.is_graph_output()
        and all(usage.node.graph is producer.graph for usage in uses)
    ):
        yield from dict.fromkeys(usage.node for usage in uses)


def _scales(node: ir.Node, value: ir.Value, factor: float) -> bool:
    """Whether the node multiplies the value by that number."""
    if node.domain or node.op_type not in ("Mul", "Div"):
        return False
    if node.op_type == "Div":
        return node.inputs[0] is value and _is_number(node.inputs[1], 1 / factor)
    return _is_number(other(node, value), factor)


def _number(value: ir.Value | None) -> float | None:
    """The number that a constant is; None for what is none, or of several axes."""
    tensor = constant(value)
    alone = tensor is not None and sizes(tensor) in ((), (1,))
    return float(to_torch(tensor).reshape(())) if alone and tensor is not None else None


def _is_number(value: ir.Value | None, number: float) -> bool:
    found = _number(value)
    return found is not None and abs(found - number) < 1e-5 * abs(number)
