"""Slicing an ONNX model's streams: other constants in its layers, other nodes in place of its norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import from_torch
from tdpass.models.onnx.rewriting.edits import replace_constant, write_bias
from tdpass.models.onnx.rewriting.head_shapes import resize_heads
from tdpass.models.onnx.rewriting.rewrite import remove_nodes, take_place
from tdpass.models.onnx.sites.sites import FoundSite
from tdpass.models.onnx.sites.weight_use import Slot
from tdpass.models.streams import NewLayer, NewNorm, StreamEdits

_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_AXES_AS_INPUT = 18
_LONGEST = 16


def slice_graph(
    model: ir.Model,
    sites: Mapping[str, FoundSite],
    edits: StreamEdits,
    names: Mapping[int, str],
    constants: Mapping[int, ir.Value],
) -> None:
    """Carry out the edits in place; `names` and `constants` give by id what a recorded run's tensors are.

    Raises `UnsupportedError`, before anything changes, for a tensor that is computed while the model runs,
    and a norm that is no node of its own.
    """
    norms = {key: _norm_node(constants.get(key)) for key in edits.norms}
    sums = {key: _sum_with(norms[key][1]) for key, norm in edits.norms.items() if norm.shortcut is not None}
    layers = {
        **edits.layers,
        **{key: NewLayer(edits.tables[key], None) for key in edits.tables if key in names},
    }
    if any(key not in names or _scales(sites[names[key]]) for key in layers):
        raise UnsupportedError("a layer on the stream is no site, or scales its weight")
    tables = {key: table for key, table in edits.tables.items() if key not in names}
    if any(key not in constants for key in tables):
        raise UnsupportedError("a constant that the stream is computed from is no initializer of the model")
    for key, layer in layers.items():
        write_layer(model, names[key], sites[names[key]], layer.weight, layer.bias)
    for key, table in tables.items():
        for node, index in constants[key].uses():
            replace_constant(model, Slot(node, index), table, str(constants[key].name))
    for key, width in edits.heads.items():
        resize_heads(model, sites[names[key]], names[key], width)
    for key, (node, place) in sums.items():
        _write_shortcut(model, node, place, edits.norms[key].shortcut)
    for key, (node, x) in norms.items():
        _write_norm(model, node, x, edits.norms[key], edits.held[key].dtype)


def _scales(site: FoundSite) -> bool:
    return any(use.scale != 1.0 or use.bias_scale != 1.0 for use in site.uses)


def _norm_node(weight: ir.Value | None) -> tuple[ir.Node, ir.Value]:
    """The node that scales by a norm's weight, and what the norm reads."""
    readers = [] if weight is None else [node for node, _ in weight.uses()]
    if len(readers) == 1:
        (node,) = readers
        read = node.inputs[0] if node.op_type in _NORMS else _read_by(node, weight)
        if read is not None:
            return node, read
    raise UnsupportedError("a norm on the stream is no node of its own with a scale of its own")


def _read_by(node: ir.Node, weight: ir.Value | None) -> ir.Value | None:
    """The x of a product that ends `x / sqrt(mean(x^2) + eps) * weight`."""
    u = next((value.producer() for value in node.inputs if value is not None and value is not weight), None)
    if u is None or u.op_type not in {"Mul", "Div"} or len(u.inputs) != 2:
        return None
    one, other = u.inputs
    assert one is not None
    assert other is not None
    x = next((a for a, b in ((one, other), (other, one)) if _leads_to(a, b)), None)
    maker = None if x is None else x.producer()
    return None if maker is not None and maker.op_type == "Sub" else x  # that would be a LayerNorm


def _leads_to(x: ir.Value, y: ir.Value) -> bool:
    ahead, seen = [y], list[ir.Value]()
    while ahead and len(seen) < _LONGEST:
        value = ahead.pop(0)
        seen.append(value)
        maker = value.producer()
        ahead += [] if maker is None else [read for read in maker.inputs if read is not None]
    return x in seen


def write_layer(model: ir.Model, name: str, site: FoundSite, weight: Tensor, bias: Tensor | None) -> None:
    """Put another weight `[o, i, *kernel]`, and bias, at every use of a site."""
    for use in site.uses:
        replace_constant(model, use.weight, use.turned(weight).contiguous(), f"{name}.weight")
        if bias is not None:
            write_bias(model, use, bias, f"{name}.bias")


def _write_norm(model: ir.Model, node: ir.Node, x: ir.Value, new: NewNorm, dtype: torch.dtype) -> None:
    """`c / sqrt(mean(c^2) + eps)` and the adapter, spelled out: RMSNormalization is of opset 23."""
    made = _Nodes(model, node.name or "norm")
    if new.drops:
        bounds = {"starts": 0, "ends": new.reads, "axes": -1}
        x = made.node(
            "Slice", [x, *(made.constant(label, torch.tensor([at])) for label, at in bounds.items())]
        )
    square = made.node("Mul", [x, x])
    if opset_of(model) >= _AXES_AS_INPUT:
        mean = made.node("ReduceMean", [square, made.constant("last", torch.tensor([-1]))])
    else:
        mean = made.node("ReduceMean", [square], axes=[-1])
    eps = made.constant("eps", torch.tensor(new.eps, dtype=dtype))
    y = made.node("Div", [x, made.node("Sqrt", [made.node("Add", [mean, eps])])])
    if new.adapter is not None:
        y = made.node("MatMul", [y, made.constant("adapter.weight", new.adapter.T.contiguous())])
    if new.shift is not None:
        y = made.node("Add", [y, made.constant("adapter.bias", new.shift)])
    model.graph.insert_before(node, made.nodes)
    take_place(node.outputs[0], y)
    remove_nodes(model.graph, [node])


def _sum_with(x: ir.Value) -> tuple[ir.Node, int]:
    """The node that adds to what a norm reads, and where it reads that."""
    found = [(node, place) for node, place in x.uses() if node.op_type == "Add" and not node.domain]
    if len(found) != 1:
        raise UnsupportedError(f"{len(found)} nodes add to what a norm on the stream reads, not one")
    return found[0]


def _write_shortcut(model: ir.Model, node: ir.Node, place: int, shortcut: Tensor | None) -> None:
    assert shortcut is not None
    made, x = _Nodes(model, node.name or "sum"), node.inputs[place]
    assert x is not None
    led = made.node("MatMul", [x, made.constant("shortcut.weight", shortcut.T.contiguous())])
    model.graph.insert_before(node, made.nodes)
    node.replace_input_with(place, led)


class _Nodes:
    """Nodes that will stand in one place, and the constants that they read."""

    def __init__(self, model: ir.Model, name: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._name, self._names = model.graph, name, FreshNames(model)

    def node(self, kind: str, inputs: Sequence[ir.Value], **attributes: Sequence[int]) -> ir.Value:
        """What a node of that kind makes of its inputs."""
        made = ir.node(kind, inputs, attributes or None, name=self._names.node(f"{self._name}/{kind}"))
        made.outputs[0].name = self._names.value(f"{self._name}/{kind}")
        self.nodes.append(made)
        return made.outputs[0]

    def constant(self, label: str, tensor: Tensor) -> ir.Value:
        """An initializer."""
        stored = from_torch(tensor)
        shape, kind = ir.Shape(list(tensor.shape)), ir.TensorType(stored.dtype)
        value = ir.Value(
            name=self._names.value(f"{self._name}.{label}"), shape=shape, type=kind, const_value=stored
        )
        self._graph.register_initializer(value)
        return value
