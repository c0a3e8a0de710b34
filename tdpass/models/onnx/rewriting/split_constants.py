"""Weights that a Split takes apart whenever the model runs, as constants of their own.

So exporters write attention whose queries read another sequence than its keys and values.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

import tdpass.models.onnx.graph.layout  # noqa: F401 - fills the table of functions
from tdpass.models.onnx.graph.functions import FUNCTIONS, Operator
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import FLOAT_TYPES, constant, from_torch, sizes, to_torch


def split_constants(model: ir.Model) -> None:
    """Let the parts of every weight that a Split alone reads be initializers."""
    names = FreshNames(model)
    for graph in list(model.graphs()):
        for node in list(graph):
            if not node.domain and node.op_type == "Split" and _alone(node):
                _apart(model, node, names)


def _alone(node: ir.Node) -> bool:
    """Whether a Split alone reads a weight, or reads a bias, which may be stored twice, and nodes its parts."""
    source = node.inputs[0]
    tensor = None if source is None or not source.is_initializer() else constant(source)
    if source is None or tensor is None or tensor.dtype not in FLOAT_TYPES:
        return False
    how = [value for value in node.inputs[1:] if value is not None]
    returned = source.is_graph_output() or any(output.is_graph_output() for output in node.outputs)
    alone = len(source.uses()) == 1 or len(sizes(tensor)) < 2
    return alone and all(constant(value) is not None for value in how) and not returned


def _apart(model: ir.Model, node: ir.Node, names: FreshNames) -> None:
    source, graph = node.inputs[0], node.graph
    tensor = constant(source)
    assert source is not None and source.graph is not None and tensor is not None and graph is not None  # noqa: PT018
    operator = Operator("Split", opset_of(model), node.attributes, len(node.outputs))
    lengths = [to_torch(held) for value in node.inputs[1:] if (held := constant(value)) is not None]
    parts = FUNCTIONS.get("Split")(operator, torch.empty(sizes(tensor), device="meta"), *lengths)
    axis, start = operator.integer("axis"), 0
    for place, (output, part) in enumerate(zip(node.outputs, parts, strict=True)):
        shape, name = ir.Shape(list(part.shape)), names.value(f"{source.name}.{place}")
        made = partial(_part, tensor, axis, start, part.shape[axis])
        value = ir.Value(
            name=name, shape=shape, type=ir.TensorType(tensor.dtype),
            const_value=ir.LazyTensor(made, tensor.dtype, shape, name=name),
        )  # fmt: skip
        value.metadata_props.update(source.metadata_props)
        output.replace_all_uses_with(value)
        source.graph.register_initializer(value)
        start += part.shape[axis]
    graph.remove(node, safe=True)


def _part(tensor: ir.TensorProtocol, axis: int, start: int, length: int) -> ir.TensorProtocol:
    whole: Tensor = to_torch(tensor)
    return from_torch(whole.narrow(axis, start, length))
