"""Writing factored layers into a copy of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from tdpass.form import DYNAMIC
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.formats.lines import apply_stored
from tdpass.models.onnx.graph.graphs import nodes_of, opset_of, within
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.operators.ops import OnnxOps
from tdpass.models.onnx.sites.parameters import HOLDS
from tdpass.models.onnx.sites.sites import FoundSite
from tdpass.models.onnx.sites.weight_use import WeightUse

INPUTS_HOLD_INITIALIZERS_BELOW = 4
Close = Callable[[ir.Model, Mapping[str, Layer]], frozenset[str]]


def _nothing_closed(_model: ir.Model, _layers: Mapping[str, Layer]) -> frozenset[str]:
    return frozenset()


def rewritten(
    model: ir.Model,
    sites: Mapping[str, FoundSite],
    layers: Mapping[str, Layer],
    shapes: Shapes,
    *,
    integers: bool = False,
    close: Close = _nothing_closed,
) -> ir.Model:
    """A copy of the model with these layers in place of the dense ones.

    Weights that stay are shared, not copied.  `close` first puts back what was opened for layers that are not
    there, and says which sites it has seen to. With `integers` the weights that are such are written for
    activations that are, too.
    """
    copy = model.clone()
    twins = dict(zip(*map(nodes_of, (model, copy)), strict=True))
    names = FreshNames(copy)
    recorders: list[OnnxOps] = []
    seen_to = close(copy, layers)
    for name, layer in layers.items():
        if name in seen_to:
            continue
        site = sites[name]
        dynamic = layer.form.activations == DYNAMIC
        ops = OnnxOps(name, opset_of(copy), names, shapes, integers=integers, dynamic=dynamic)
        recorders.append(ops)
        storage = layer.storage
        told = layer.factors if storage.numbers else storage.orders
        holds = {label: {HOLDS: str(storage.count(label))} for label in told}
        factors = {
            label: ops.constant(label, factor, holds.get(label), fixed=len(site.uses) > 1 and site.site.table)
            for label, factor in layer.factors.items()
        }
        bias = None if layer.bias is None else ops.constant("bias", layer.bias)
        for use in site.uses:
            here = use.on(twins)
            if here.node.graph is not None:  # else it went with a branch that was dropped
                _put(here.node.graph, here, ops, layer, factors, bias, site)
    if any(_resizes(layer, sites[name]) for name, layer in layers.items()):
        forget_shapes(copy)
    for domain, version in (pair for ops in recorders for pair in ops.imports.items()):
        copy.graph.opset_imports.setdefault(domain, version)
    prune_initializers(copy)
    # Only now are the names of the weights that were replaced free again.
    names = FreshNames(copy)
    for value, wanted in (pair for ops in recorders for pair in ops.constants_read()):
        value.name = names.value(wanted)
        copy.graph.register_initializer(value)
    if (copy.ir_version or 0) < INPUTS_HOLD_INITIALIZERS_BELOW:
        copy.graph.inputs.extend(
            value for value in copy.graph.initializers.values() if not value.is_graph_input()
        )
    return copy


def _put(
    graph: ir.Graph | ir.Function,
    use: WeightUse,
    ops: OnnxOps,
    layer: Layer,
    factors: Mapping[str, ir.Value],
    bias: ir.Value | None,
    site: FoundSite,
) -> None:
    storage = layer.storage

    def values() -> Mapping[str, ir.Value]:
        if site.kept == site.dtype or storage.numbers:
            return factors
        return {
            label: value if label in storage.orders else ops.cast(value, site.dtype)
            for label, value in factors.items()
        }

    def made(x: ir.Value) -> ir.Value:
        if use.reads_rows:
            restored = storage.restore(ops, values(), site.dtype)
            return FORMATS.get(layer.format).rows(ops, x, restored, layer.site, layer.rank)
        return apply_stored(ops, x, values(), bias, layer.site, layer.form, storage, site.dtype)

    addend = None if use.addend is None else ops.scale(use.addend.value, use.addend_scale, site.dtype)
    x = use.input.value
    y = use.apply(ops, x if use.preceding is None else use.preceding.written(ops, x), made, addend)
    y = ops.computed(y if use.following is None else use.following.written(ops, y))
    nodes = ops.take_nodes()
    for node in nodes:
        node.metadata_props.update(use.node.metadata_props)
    graph.insert_before(use.node, nodes)
    take_place(use.output, y)
    remove_nodes(graph, use.nodes)


def _resizes(layer: Layer, found: FoundSite) -> bool:
    """Whether the layer's output is smaller than dense, so that declared sizes after it no longer hold."""
    return not layer.factors or layer.site.o != found.site.o


def forget_shapes(model: ir.Model) -> None:
    """Drop the declared sizes of what nodes make."""
    for node in nodes_of(model):
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


def remove_nodes(graph: ir.Graph | ir.Function, nodes: Iterable[ir.Node]) -> None:
    """Remove nodes that nothing reads any more, and then those that only they read."""
    gone = list(nodes)
    suspects = [value.producer() for node in gone for value in node.inputs if value is not None]
    for inner in (inner for node in gone for inner in within(node)):
        for place in range(len(inner.inputs)):  # what bodies read from outside is read no more
            inner.replace_input_with(place, None)
    graph.remove(gone, safe=True)
    for node in suspects:
        if (
            node is not None
            and node.graph is not None
            and not any(output.uses() or output.is_graph_output() for output in node.outputs)
        ):
            remove_nodes(node.graph, [node])


def prune_initializers(model: ir.Model) -> None:
    """Drop the initializers that nothing reads, in every graph."""
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]
