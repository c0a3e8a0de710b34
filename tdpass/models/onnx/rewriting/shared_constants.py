"""What a model comes to hold several times once its local functions are written out, stored once."""

from __future__ import annotations

import onnx_ir as ir

from tdpass.models.onnx.graph.graphs import nodes_of
from tdpass.models.onnx.graph.tensors import lent, sizes


def share_constants(model: ir.Model) -> None:
    """Let Constant nodes of the same tensor, as several calls of a function have it, be one initializer."""
    holders: dict[int, list[ir.Node]] = {}
    for node in nodes_of(model):
        if _holds_tensor(node):
            holders.setdefault(id(node.attributes["value"].value), []).append(node)
    for nodes in holders.values():
        if len(nodes) > 1:
            _share(model, nodes)


def _holds_tensor(node: ir.Node) -> bool:
    """Whether a node is a constant tensor that the graph only reads."""
    constant = node.op_type == "Constant" and not node.domain and "value" in node.attributes
    return constant and not node.outputs[0].is_graph_output()


def _share(model: ir.Model, nodes: list[ir.Node]) -> None:
    tensor, name = nodes[0].attributes["value"].as_tensor(), nodes[0].outputs[0].name
    value = ir.Value(
        shape=ir.Shape(sizes(tensor)), type=ir.TensorType(tensor.dtype), const_value=lent(tensor)
    )
    for node in nodes:
        node.outputs[0].replace_all_uses_with(value)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    value.name = name
    model.graph.register_initializer(value)
