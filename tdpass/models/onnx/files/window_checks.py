"""Checks of convolutions against the weights that they read.

The checker of ONNX looks at neither channels nor groups.
"""

from __future__ import annotations

import onnx_ir as ir

from tdpass.errors import InvalidModelError
from tdpass.models.onnx.graph.graphs import all_nodes
from tdpass.models.onnx.graph.shapes import Dims, Shapes
from tdpass.models.onnx.graph.tensors import dims

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})


def check_windows(model: ir.Model, shapes: Shapes) -> None:
    """Raise `InvalidModelError` for a convolution that does not fit its weight.

    Its group, kernel, window and channels are compared.
    """
    for node in all_nodes(model):
        if node.domain or node.op_type not in _CONVOLUTIONS or len(node.inputs) < 2:
            continue
        x, weight = node.inputs[:2]
        sizes = None if weight is None else dims(weight)
        if x is not None and sizes is not None and len(sizes) > 2:
            problem = _problem(node, shapes.of(x), sizes)
            if problem:
                raise InvalidModelError(
                    f"node {node.name or node.outputs[0].name!r} ({node.op_type}) {problem}; export the "
                    "model again"
                )


def _problem(node: ir.Node, x: Dims | None, weight: Dims) -> str:
    """What does not fit; empty where all does."""
    group, transposed = node.attributes.get_int("group", 1), node.op_type == "ConvTranspose"
    ends, kernel = weight[:2], weight[2:]
    whole = ends[0]
    if whole is not None and whole % group:
        return f"has group={group}, which does not divide the {whole} channels of its weight {list(weight)}"
    given = tuple(node.attributes.get_ints("kernel_shape", ()))
    if given and (
        len(given) != len(kernel)
        or any(size not in (None, wanted) for size, wanted in zip(kernel, given, strict=True))
    ):
        return f"has kernel_shape={list(given)}, but its weight {list(weight)} has the kernel {list(kernel)}"
    for name, count in {"strides": len(kernel), "dilations": len(kernel), "pads": 2 * len(kernel)}.items():
        numbers = node.attributes.get_ints(name, ())
        if numbers and len(numbers) != count:
            return f"has {name}={list(numbers)}; its weight {list(weight)} wants {count} numbers"
    first, second = ends[0], None if ends[1] is None else ends[1] * group
    read, made = (first, second) if transposed else (second, first)
    channels = x[1] if x is not None and len(x) > 1 else None
    if None not in (read, channels) and read != channels:
        return f"reads {channels} channels, but its weight {list(weight)} with group={group} takes {read}"
    return _bias_problem(node, made)


def _bias_problem(node: ir.Node, made: int | None) -> str:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    sizes = None if bias is None else dims(bias)
    if sizes is None or made is None or sizes in ((made,), (None,)):
        return ""
    return f"has a bias of sizes {list(sizes)}, but makes {made} channels"
