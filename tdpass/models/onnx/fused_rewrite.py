"""Writing fused operators into a graph in place of the layers that they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from tdpass.models.onnx.chains import LayerNode, find_chains
from tdpass.models.onnx.fused_ops import DOMAIN, FUNCTIONS_SINCE_IR, LANES, VERSION, FusedOp
from tdpass.models.onnx.names import FreshNames
from tdpass.models.onnx.rewrite import opset_of, prune_initializers, remove_nodes, take_place
from tdpass.models.onnx.tensors import from_torch, held, to_torch


@dataclass(frozen=True)
class Fusion:
    """That a chain is to be one operator with these lanes, as long as it is the chain that it was."""

    signature: tuple[object, ...]
    lanes: str


Fusions = Mapping[str, Fusion]


def fused(model: ir.Model, fusions: Fusions) -> ir.Model:
    """The model, changed in place: the chains that make these values are nodes of com.tdpass, and functions say what those compute."""
    if not fusions:
        return model
    plain_initializers(model)
    names = FreshNames(model)
    matrices: dict[ir.Value, ir.Value] = {}
    for chain in find_chains(model):
        fusion = fusions.get(str(chain.y.name))
        if fusion is None or fusion.signature != chain.signature:
            continue
        weights = [_weight(layer, matrices) for layer in chain.layers]
        added = [value for value in (chain.bias, chain.residual.value if chain.residual else None) if value is not None]
        node = fused_node(chain.op, chain.layers, [chain.x, *weights, *added], fusion.lanes, names.node(f"{chain.label}/fused"))
        node.outputs[0].name = names.value(f"{chain.label}/fused")
        node.metadata_props.update(chain.nodes[0].metadata_props)
        model.graph.insert_before(chain.nodes[-1], node)
        take_place(chain.y, node.outputs[0])
        remove_nodes(model.graph, chain.nodes)
        add_function(model, chain.op)
    prune_initializers(model)
    names = FreshNames(model)
    for stored, matrix in matrices.items():
        matrix.name = names.value(stored.name or "matrix")
        model.graph.register_initializer(matrix)
    return model


def fused_node(op: FusedOp, layers: Sequence[LayerNode], inputs: Sequence[ir.Value], lanes: str, name: str) -> ir.Node:
    """The node of an operator that computes these layers."""
    attributes: dict[str, int | list[int]] = {}
    for k, layer in enumerate(layers, start=1):
        stage, axes = layer.stage, layer.axes
        if axes:
            attributes |= {
                f"group_{k}": stage.groups,
                f"strides_{k}": list(stage.stride[-axes:]),
                f"pads_{k}": [*stage.before[-axes:], *stage.after[-axes:]],
                f"dilations_{k}": list(stage.dilation[-axes:]),
            }
    return ir.node(op.name, inputs, attributes={**attributes, "lanes": LANES.index(lanes)}, domain=DOMAIN, name=name)


def add_function(model: ir.Model, op: FusedOp) -> None:
    """Say in the model what the operator computes."""
    model.ir_version = max(model.ir_version or 0, FUNCTIONS_SINCE_IR)
    model.graph.opset_imports[DOMAIN] = VERSION
    function = op.function(opset_of(model))
    model.functions.setdefault(function.identifier(), function)


def plain_initializers(model: ir.Model) -> None:
    """Take the initializers out of the graph's inputs where the IR version wants them there, which one with functions does not."""
    if (model.ir_version or 0) < 4:
        for value in [value for value in model.graph.inputs if value.is_initializer()]:
            model.graph.inputs.remove(value)


def _weight(layer: LayerNode, matrices: dict[ir.Value, ir.Value]) -> ir.Value:
    """The weight as the operator takes it; a flipped matrix is stored anew, once for all its readers."""
    if not layer.flipped:
        return layer.weight
    if layer.weight not in matrices:
        tensor = from_torch(to_torch(held(layer.weight)).T)
        value = ir.Value(shape=ir.Shape([layer.stage.inputs, layer.stage.outputs]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        value.metadata_props.update(layer.weight.metadata_props)
        matrices[layer.weight] = value
    return matrices[layer.weight]
