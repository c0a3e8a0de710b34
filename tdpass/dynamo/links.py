"""Layers in a graph as Dynamo records it.

Calls of linear and convolution functions whose weights are inputs of the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from tdpass.fusing.spec import Link
from tdpass.kernels.conv_chain import MAX_TAPS
from tdpass.kernels.stage import Pair, Stage
from tdpass.models.torch.graphs.graph_calls import argument, tensor_of

_CONVOLUTIONS = {torch.conv1d, F.conv1d, torch.conv2d, F.conv2d, torch.conv3d, F.conv3d}
_PRODUCTS = {operator.matmul, torch.matmul, torch.mm}
_PRODUCT_METHODS = {"matmul", "mm", "__matmul__"}
_PADS = {F.pad, torch._C._nn.pad}


@dataclass(frozen=True)
class GraphLink(Link[Node, Node]):
    """A layer, with its geometry on any number of axes."""

    strides: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def read_link(node: Node, stored: AbstractSet[Node]) -> GraphLink | None:
    """The layer that a node calls, where its weight is one of `stored`; None for everything else."""
    if node.op == "call_function" and node.target is F.linear:
        return _linear(
            node,
            argument(node, 0, "input"),
            argument(node, 1, "weight"),
            argument(node, 2, "bias"),
            stored,
            transposed=False,
        )
    if (node.op == "call_function" and node.target in _PRODUCTS) or (
        node.op == "call_method" and node.target in _PRODUCT_METHODS
    ):
        other = argument(node, 1, "other", argument(node, 1, "mat2"))
        return _linear(node, argument(node, 0, "input"), other, None, stored, transposed=True)
    if node.op == "call_function" and node.target in _CONVOLUTIONS:
        return _convolution(node, stored)
    return None


def _linear(
    node: Node, x: Any, weight: Any, bias: Any, stored: AbstractSet[Node], *, transposed: bool
) -> GraphLink | None:
    value, matrix = tensor_of(x), tensor_of(weight)
    if (
        value is None
        or matrix is None
        or weight not in stored
        or x in stored
        or value.dim() < 2
        or matrix.dim() != 2
    ):
        return None
    outputs, inputs = reversed(matrix.shape) if transposed else matrix.shape
    return GraphLink((node,), x, weight, bias, 0, Stage(inputs, outputs), transposed=transposed)


def _convolution(node: Node, stored: AbstractSet[Node]) -> GraphLink | None:
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    value, kernel = tensor_of(x), tensor_of(weight)
    if value is None or kernel is None or weight not in stored or value.dim() != kernel.dim():
        return None
    axes = kernel.dim() - 2
    stride, dilation = (
        _expand(argument(node, position, name, 1), axes)
        for position, name in ((3, "stride"), (5, "dilation"))
    )
    groups, size = int(argument(node, 6, "groups", 1)), tuple(kernel.shape[2:])
    pads = _pads(argument(node, 4, "padding", 0), size, dilation)
    nodes: tuple[Node, ...] = (node,)
    before = _padding_of(x, axes)
    if before is not None:
        nodes, x = (x, node), argument(x, 0, "input")
        pads = tuple((a + c, b + d) for (a, b), (c, d) in zip(pads, before, strict=True))
    stage = None
    if axes <= 2 and math.prod(size) <= MAX_TAPS:
        before_, after_ = zip(*pads, strict=True)
        stage = Stage(
            kernel.shape[1] * groups,
            kernel.shape[0],
            groups,
            _pair(size, 1),
            _pair(stride, 1),
            _pair(before_, 0),
            _pair(after_, 0),
            _pair(dilation, 1),
        )
    bias = argument(node, 2, "bias")
    return GraphLink(
        nodes, x, weight, bias, axes, stage, strides=stride, pads=pads, dilation=dilation, groups=groups
    )


def _padding_of(x: Node, axes: int) -> tuple[tuple[int, int], ...] | None:
    """(before, after) per axis where the node pads space with zeros, and only one call reads it."""
    if x.op != "call_function" or x.target not in _PADS or len(x.users) != 1:
        return None
    sizes, mode, fill = argument(x, 1, "pad"), argument(x, 2, "mode", "constant"), argument(x, 3, "value")
    plain = all(isinstance(size, int) and size >= 0 for size in sizes)
    if not plain or mode != "constant" or fill not in (None, 0) or len(sizes) > 2 * axes:
        return None
    flat = [*sizes, *[0] * (2 * axes - len(sizes))]
    return tuple((flat[2 * k], flat[2 * k + 1]) for k in reversed(range(axes)))


def _pads(padding: Any, size: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(size)
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in reach)
    return tuple((p, p) for p in _expand(padding, len(size)))


def _expand(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _pair(values: Sequence[int], rest: int) -> Pair:
    """(height, width) of one or two values."""
    height, width = (rest, *values)[-2:]
    return height, width
