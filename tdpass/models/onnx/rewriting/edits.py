"""Edits of the dense model itself: other constants, a bias where there was none."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import from_torch
from tdpass.models.onnx.rewriting.rewrite import prune_initializers, remove_nodes
from tdpass.models.onnx.sites.weight_use import Slot, WeightUse


def replace_constant(model: ir.Model, slot: Slot, tensor: Tensor, name: str) -> None:
    """Put another constant at an input.

    It keeps the old one's name if nothing else reads that, else it gets a name like `name`.
    """
    old = slot.value
    value = _put(slot, tensor)
    _drop(model, old)
    _register(model, value, old.name if old.producer() is None and old.name else name)
    value.metadata_props.update(old.metadata_props)


def write_bias(model: ir.Model, use: WeightUse, bias: Tensor, name: str) -> None:
    """Give the layer of a convolution, a Gemm or a MatMul this bias."""
    node = use.node
    if node.op_type == "Gemm":
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    if use.bias is not None:
        replace_constant(model, use.bias, bias, name)
    elif node.op_type == "MatMul":
        _append_add(model, node, bias, name)
    else:
        node.resize_inputs(3)
        _register(model, _put(Slot(node, 2), bias), name)


def _append_add(model: ir.Model, producer: ir.Node, bias: Tensor, name: str) -> None:
    """Let a sum with the bias take the place of the node's output for its one reader."""
    product = producer.outputs[0]
    ((reader, index),) = product.uses()
    names = FreshNames(model)
    add = ir.node("Add", [product, None], name=names.node(f"{name}/add"))
    add.outputs[0].name = names.value(f"{name}/add")
    add.outputs[0].shape, add.outputs[0].type = product.shape, product.type
    reader.replace_input_with(index, add.outputs[0])
    assert producer.graph is not None
    producer.graph.insert_after(producer, add)
    _register(model, _put(Slot(add, 1), bias), name)


def _put(slot: Slot, tensor: Tensor) -> ir.Value:
    held = from_torch(tensor.contiguous())
    value = ir.Value(shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held)
    slot.node.replace_input_with(slot.index, value)
    return value


def _drop(model: ir.Model, old: ir.Value) -> None:
    producer = old.producer()
    if producer is None:
        prune_initializers(model)
    elif not old.uses() and producer.graph is not None:
        remove_nodes(producer.graph, [producer])


def _register(model: ir.Model, value: ir.Value, wanted: str) -> None:
    value.name = FreshNames(model).value(wanted)
    model.graph.register_initializer(value)
