"""Writing factored layers into a copy of a graph, and the edits of dense layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir
from torch import Tensor

from tdpass.errors import InvalidModelError
from tdpass.formats.base import FORMATS, Layer
from tdpass.models.onnx_names import FreshNames
from tdpass.models.onnx_ops import OnnxOps
from tdpass.models.onnx_shapes import Shapes
from tdpass.models.onnx_sites import FoundSite
from tdpass.models.onnx_tensors import from_torch
from tdpass.models.onnx_use import Slot, Use

_INPUTS_HOLD_INITIALIZERS_BELOW = 4


def rewritten(model: ir.Model, sites: Mapping[str, FoundSite], layers: Mapping[str, Layer], shapes: Shapes) -> ir.Model:
    """A copy of the model with these layers in place of the dense ones; weights that stay are shared, not copied."""
    copy = model.clone()
    twins = dict(zip(model.graph, copy.graph, strict=True))
    names = FreshNames(copy)
    recorders: list[OnnxOps] = []
    for name, layer in layers.items():
        site = sites[name]
        ops = OnnxOps(name, opset_of(copy), names, shapes)
        recorders.append(ops)
        factors = {label: ops.constant(label, factor) for label, factor in layer.factors.items()}
        bias = None if layer.bias is None else ops.constant("bias", layer.bias)
        for use in site.uses:
            here = use.on(twins)
            if here.node.graph is copy.graph:  # else it went with a branch that was dropped
                _put(copy.graph, here, ops, layer, factors, bias, site)
    if any(_resizes(layer) for layer in layers.values()):
        _forget_shapes(copy)
    prune_initializers(copy)
    # Only now are the names of the weights that were replaced free again.
    names = FreshNames(copy)
    for value, wanted in (pair for ops in recorders for pair in ops.constants_read()):
        value.name = names.value(wanted)
        copy.graph.register_initializer(value)
    if (copy.ir_version or 0) < _INPUTS_HOLD_INITIALIZERS_BELOW:
        copy.graph.inputs.extend(value for value in copy.graph.initializers.values() if not value.is_graph_input())
    return copy


def _put(graph: ir.Graph, use: Use, ops: OnnxOps, layer: Layer, factors: Mapping[str, ir.Value], bias: ir.Value | None, site: FoundSite) -> None:
    layout = FORMATS.get(layer.format)
    addend = None if use.addend is None else ops.scale(use.addend.value, use.addend_scale, site.dtype)
    y = use.apply(ops, use.input.value, lambda x: layout.apply(ops, x, factors, bias, layer.site, layer.rank), addend)
    y = ops.computed(y)
    nodes = ops.take_nodes()
    for node in nodes:
        node.metadata_props.update(use.node.metadata_props)
    graph.insert_before(use.node, nodes)
    take_place(use.output, y)
    remove_nodes(graph, use.nodes)


def _resizes(layer: Layer) -> bool:
    """Whether the layer's output is smaller than the dense layer's, so that declared sizes after it no longer hold."""
    return not layer.factors or FORMATS.get(layer.format).outputs(layer.site, layer.rank) != layer.site.o


def _forget_shapes(model: ir.Model) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be what `old` was: for every reader, as a graph output, in name and in declared type."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name, old.name = old.name, None
    new.name = name
    new.shape, new.type, new.doc_string = old.shape, old.type, old.doc_string
    new.metadata_props.update(old.metadata_props)


def remove_nodes(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Remove nodes that nothing reads any more, and then those that only they read."""
    gone = list(nodes)
    suspects = [value.producer() for node in gone for value in node.inputs if value is not None]
    graph.remove(gone, safe=True)
    for node in suspects:
        if node is not None and node.graph is graph and not any(output.uses() or output.is_graph_output() for output in node.outputs):
            remove_nodes(graph, [node])


def prune_initializers(model: ir.Model) -> None:
    """Drop the initializers that nothing reads, in every graph."""
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]


def opset_of(model: ir.Model) -> int:
    """Version of the standard operator set."""
    return int(model.opset_imports.get("", 0))


def write_bias(model: ir.Model, name: str, site: FoundSite, bias: Tensor) -> None:
    """Give a dense site this bias, in the dense model itself."""
    column = site.uses[0].swap_out is not None
    tensor = bias.to(site.dtype).reshape(-1, 1) if column else bias.to(site.dtype)
    value = new_constant(tensor.contiguous())
    for use in site.uses:
        _write_bias_at(model, name, use, value)
    prune_initializers(model)
    value.name = FreshNames(model).value(f"{name}.bias")
    model.graph.register_initializer(value)


def _write_bias_at(model: ir.Model, name: str, use: Use, value: ir.Value) -> None:
    node = use.node
    if use.bias is not None:
        use.bias.node.replace_input_with(use.bias.index, value)
    elif node.op_type != "MatMul" and use.addend is None:
        node.resize_inputs(3)
        node.replace_input_with(2, value)
    else:
        _append_add(model, name, use.output, value)
        return
    if node.op_type == "Gemm":
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)


def _append_add(model: ir.Model, name: str, output: ir.Value, value: ir.Value) -> None:
    names = FreshNames(model)
    producer = output.producer()
    if producer is None:
        raise InvalidModelError(f"{output.name!r} is computed by no node; keep the graph that was opened unchanged")
    add = ir.node("Add", [output, value], name=names.node(f"{name}/add"))
    readers = [usage for usage in output.uses() if usage.node is not add]
    total = add.outputs[0]
    total.name, total.shape, total.type = output.name, output.shape, output.type
    output.name = names.value(f"{name}/product")
    for usage in readers:
        usage.node.replace_input_with(usage.idx, total)
    graph = model.graph
    for index, value_out in enumerate(graph.outputs):
        if value_out is output:
            graph.outputs[index] = total
    graph.insert_after(producer, add)


def new_constant(tensor: Tensor) -> ir.Value:
    """A constant that is yet to be named and registered as an initializer."""
    held = from_torch(tensor)
    return ir.Value(shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held)


def replace_constant(model: ir.Model, slot: Slot, tensor: Tensor, name: str) -> None:
    """Put another constant at a slot that is the only reader of the present one."""
    value = new_constant(tensor)
    old = slot.value
    slot.node.replace_input_with(slot.index, value)
    producer = old.producer()
    if producer is None:
        prune_initializers(model)
    else:
        remove_nodes(model.graph, [producer])
    value.name = FreshNames(model).value(old.name if producer is None and old.name else f"{name}.weight")
    model.graph.register_initializer(value)
    value.metadata_props.update(old.metadata_props)
