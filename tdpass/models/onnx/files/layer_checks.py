"""Checks of recurrent nodes, and of nodes that read scales, against the weights that they read.

The checker of ONNX compares none of their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from tdpass.errors import InvalidModelError
from tdpass.models.onnx.graph.graphs import all_nodes
from tdpass.models.onnx.graph.shapes import Dims
from tdpass.models.onnx.graph.tensors import dims

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def check_layers(model: ir.Model) -> None:
    """Raise `InvalidModelError` for a node that does not fit what it reads."""
    for node in all_nodes(model):
        check = _CHECKS.get(f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
        problem = "" if check is None else check(node)
        if problem:
            raise InvalidModelError(
                f"node {node.name or node.outputs[0].name!r} ({node.op_type}) {problem}; export the model again"
            )


def _sizes(node: ir.Node, place: int) -> Dims | None:
    value = node.inputs[place] if place < len(node.inputs) else None
    return None if value is None else dims(value)


def _fits(sizes: Dims | None, wanted: Dims) -> bool:
    """Whether sizes, as far as they are known, are these, as far as they are said."""
    if sizes is None:
        return True
    pairs = zip(sizes, wanted, strict=False)
    return len(sizes) == len(wanted) and all(
        None in (ours, theirs) or ours == theirs for ours, theirs in pairs
    )


def _recurrent(node: ir.Node) -> str:
    """What does not fit of weights `[d, gates h, i]`, `[d, gates h, h]` and biases `[d, 2 gates h]`."""
    direction = node.attributes.get_string("direction", "forward")
    if direction not in _DIRECTIONS:
        return f"has direction={direction!r}; it is one of {', '.join(_DIRECTIONS)}"
    ways, gates, hidden = _DIRECTIONS[direction], _GATES[node.op_type], _sizes(node, 2)
    said = node.attributes.get_int("hidden_size", 0) or (hidden[-1] if hidden else None)
    rows = None if said is None else gates * said
    wanted: Mapping[int, Dims] = {
        1: (ways, rows, None),
        2: (ways, rows, said),
        3: (ways, None if rows is None else 2 * rows),
    }
    for place, sizes in wanted.items():
        given = _sizes(node, place)
        if not _fits(given, sizes):
            shown = [size if size is not None else "any" for size in sizes]
            return f"reads {list(given or ())} as input {place} where hidden_size={said} takes {shown}"
    return _states(node, ways, said)


def _states(node: ir.Node, ways: int, hidden: int | None) -> str:
    """What does not fit of the first states `[d, n, h]`; torch's exporter drops projections of an LSTM."""
    sizes = {place: _sizes(node, place) for place in (5, 6)[: 2 if node.op_type == "LSTM" else 1]}
    wrong = next((given for given in sizes.values() if not _fits(given, (ways, None, hidden))), None)
    if wrong is None:
        return ""
    return (
        f"reads a first state of sizes {list(wrong)} where hidden_size={hidden} takes [{ways}, any, {hidden}] "
        "(ONNX has no LSTM with projections, and torch drops them from it: for nn.LSTM(proj_size=...) export "
        "tdpass.open_recurrent(model), or compress the torch model)"
    )


def _scaled(values: int, axis: Callable[[ir.Node], int]) -> Callable[[ir.Node], str]:
    """The check of a scale, one or one for every slice along an axis, of the integers at a place."""

    def check(node: ir.Node) -> str:
        sizes, scale, along = _sizes(node, values), _sizes(node, values + 1), axis(node)
        block = node.attributes.get_int("block_size", 0)
        if block or sizes is None or scale is None or scale in ((), (1,)):
            return ""
        if not -len(sizes) <= along < len(sizes):
            return f"has axis={along}, but what it reads has {len(sizes)} axes"
        fits = _fits(scale, (sizes[along],))
        return "" if fits else f"has scales of sizes {list(scale)} for integers of sizes {list(sizes)}"

    return check


def _dequantized(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 1)


def _first(_node: ir.Node) -> int:
    return 0


def _last(_node: ir.Node) -> int:
    return -1


def _outputs(node: ir.Node) -> int:
    return 0 if node.attributes.get_int("transB", 0) else 1


_CHECKS: Mapping[str, Callable[[ir.Node], str]] = {
    **dict.fromkeys(_GATES, _recurrent),
    "DequantizeLinear": _scaled(0, _dequantized),
    "QLinearConv": _scaled(3, _first),
    "QLinearMatMul": _scaled(3, _last),
    "com.microsoft::QGemm": _scaled(3, _outputs),
}
