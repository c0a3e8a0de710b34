"""Activations as exporters write them, and who reads a value."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from tdpass.models.onnx.graph.tensors import constant, sizes, to_torch

_ROOT_HALF = math.sqrt(0.5)


def activation_after(y: ir.Value) -> tuple[str, list[ir.Node]]:
    """The activation that alone reads the value, and its nodes in order.

    "identity" and none where there is no such.
    """
    for name, find in (("relu", _relu), ("silu", _silu), ("gelu", _gelu), ("relu6", _relu6)):
        found = find(y)
        if found:
            return name, found
    return "identity", []


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


def _relu(y: ir.Value) -> list[ir.Node]:
    node = sole_reader(y, "Relu")
    return [] if node is None else [node]


def _relu6(y: ir.Value) -> list[ir.Node]:
    """Clip between 0 and 6, whose bounds are attributes up to opset 10."""
    node = sole_reader(y, "Clip")
    if node is None:
        return []
    held = [constant(bound) for bound in node.inputs[1:]]
    bounds = [
        None if bound is None or bound.size != 1 else float(to_torch(bound).reshape(())) for bound in held
    ]
    if "min" in node.attributes or "max" in node.attributes:
        bounds = [node.attributes.get_float(name, math.inf) for name in ("min", "max")]
    return [node] if bounds == [0.0, 6.0] else []


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


def _is_number(value: ir.Value | None, number: float) -> bool:
    tensor = constant(value)
    return (
        tensor is not None
        and math.prod(sizes(tensor)) == 1
        and abs(float(to_torch(tensor).reshape(())) - number) < 1e-5 * abs(number)
    )
