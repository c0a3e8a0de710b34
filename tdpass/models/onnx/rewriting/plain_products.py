"""Products that make bytes of what they read in every call, written as products of floating-point numbers."""

from __future__ import annotations

import onnx_ir as ir

from tdpass.models.onnx.graph.emitting import Emitter
from tdpass.models.onnx.graph.graphs import nodes_of, opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import from_torch
from tdpass.models.onnx.rewriting.rewrite import remove_nodes, take_place
from tdpass.models.onnx.sites.dynamic_products import FloatProduct, float_product


def plain_products(model: ir.Model) -> int:
    """Let all of them multiply numbers, in place, wherever in the model; returns how many there were."""
    names, count, held = FreshNames(model), 0, dict[ir.Value, ir.Value]()
    for node in nodes_of(model):
        found = float_product(node)
        if found is not None:
            _write(Emitter(model.graph, names, _label(node), opset_of(model)), found, held)
            count += 1
    return count


def _write(emit: Emitter, found: FloatProduct, held: dict[ir.Value, ir.Value]) -> None:
    """A product; `held` are the numbers of each weight, which products may share."""
    if found.weight not in held:
        name = str(found.weight.name).removesuffix("_quantized")
        held[found.weight] = emit.held(from_torch(found.make().contiguous()), emit.free(name))
    made = emit.put(
        ir.Node(
            found.domain,
            found.operator,
            [found.x, held[found.weight], *found.rest],
            list(found.like.attributes.values()),
            num_outputs=len(found.nodes[-1].outputs),
            name=emit.free(_label(found.like)),
            metadata_props=dict(found.like.metadata_props),
        )
    )
    outputs = made if found.bias is None else [emit("Add", made[0], found.bias)]
    graph = found.nodes[-1].graph
    assert graph is not None
    graph.insert_before(found.nodes[-1], emit.take())
    for old, new in zip(found.nodes[-1].outputs, outputs, strict=True):
        if old.name:
            take_place(old, new)
        else:
            new.name = ""
    remove_nodes(graph, found.nodes)


def _label(node: ir.Node) -> str:
    return (node.name or node.op_type).removesuffix("_quant")
