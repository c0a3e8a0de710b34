"""Writing fused operators into a graph in place of the layers that they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from tdpass.fusing.choose import LANES
from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import ChainSpec
from tdpass.kernels.stage import Lanes
from tdpass.models.onnx.chains import NodeLink, NodeReader, label, result
from tdpass.models.onnx.fused_ops import DOMAIN, FUNCTIONS_SINCE_IR, VERSION, FusedOp, function_of
from tdpass.models.onnx.graphs import opset_of
from tdpass.models.onnx.names import FreshNames
from tdpass.models.onnx.rewrite import prune_initializers, remove_nodes, take_place
from tdpass.models.onnx.tensors import from_torch, held, to_torch


@dataclass(frozen=True)
class Fusion:
    """That a chain is to be one operator with these lanes, as long as it is the chain that it was."""

    spec: ChainSpec
    lanes: Lanes


Fusions = Mapping[str, Fusion]


def fused(model: ir.Model, fusions: Fusions) -> ir.Model:
    """The model, changed in place.

    The chains that make these values are nodes of com.tdpass, and functions say what those compute.
    """
    if not fusions:
        return model
    plain_initializers(model)
    names = FreshNames(model)
    matrices: dict[ir.Value, ir.Value] = {}
    for chain in find_chains(NodeReader(model)):
        fusion = fusions.get(str(result(chain).name))
        if fusion is None or fusion.spec != chain.spec:
            continue
        weights = [_weight(link, matrices) for link in chain.links]
        added = [slot.value for slot in (chain.bias, chain.residual) if slot is not None]
        named = f"{label(chain)}/fused"
        node = fused_node(chain.spec, [chain.x.value, *weights, *added], fusion.lanes, names.node(named))
        node.outputs[0].name = names.value(named)
        node.metadata_props.update(chain.nodes[0].metadata_props)
        model.graph.insert_before(chain.result, node)
        take_place(result(chain), node.outputs[0])
        remove_nodes(model.graph, chain.nodes)
        add_function(model, chain.spec)
    prune_initializers(model)
    names = FreshNames(model)
    for stored, matrix in matrices.items():
        matrix.name = names.value(stored.name or "matrix")
        model.graph.register_initializer(matrix)
    return model


def fused_node(spec: ChainSpec, inputs: Sequence[ir.Value], lanes: Lanes, name: str) -> ir.Node:
    """The node of the operator that computes a chain."""
    attributes: dict[str, int | list[int]] = {}
    axes = spec.axes
    for k, stage in enumerate(spec.stages, start=1):
        if axes:
            attributes |= {
                f"group_{k}": stage.groups,
                f"strides_{k}": list(stage.stride[-axes:]),
                f"pads_{k}": [*stage.before[-axes:], *stage.after[-axes:]],
                f"dilations_{k}": list(stage.dilation[-axes:]),
            }
    return ir.node(
        FusedOp.of(spec).name,
        inputs,
        attributes={**attributes, "lanes": LANES.index(lanes)},
        domain=DOMAIN,
        name=name,
    )


def add_function(model: ir.Model, spec: ChainSpec) -> None:
    """Say in the model what the operator of a chain computes."""
    model.ir_version = max(model.ir_version or 0, FUNCTIONS_SINCE_IR)
    model.graph.opset_imports[DOMAIN] = VERSION
    function = function_of(FusedOp.of(spec), opset_of(model))
    model.functions.setdefault(function.identifier(), function)


def plain_initializers(model: ir.Model) -> None:
    """Take the initializers out of the graph's inputs where the IR version wants them there, which one with functions does not."""
    if (model.ir_version or 0) < 4:
        for value in [value for value in model.graph.inputs if value.is_initializer()]:
            model.graph.inputs.remove(value)


def _weight(link: NodeLink, matrices: dict[ir.Value, ir.Value]) -> ir.Value:
    """The weight as the operator takes it; a matrix `[o, i]` is stored anew, once for all its readers."""
    weight = link.weight.value
    if link.axes or link.transposed:
        return weight
    if weight not in matrices:
        tensor = from_torch(to_torch(held(weight)).T)
        value = ir.Value(
            shape=ir.Shape([link.stage.inputs, link.stage.outputs] if link.stage else []),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        value.metadata_props.update(weight.metadata_props)
        matrices[weight] = value
    return matrices[weight]
