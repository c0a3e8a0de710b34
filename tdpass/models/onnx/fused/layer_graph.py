"""Graphs of one layer, to be run alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
from torch import Tensor

from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import from_torch
from tdpass.models.onnx.operators.ops import OnnxOps
from tdpass.ops import StorageOps

INPUT, OUTPUT = "x", "y"
_OPSET, _IR_VERSION = 17, 8

Write = Callable[[StorageOps[ir.Value], ir.Value, Mapping[str, ir.Value]], ir.Value]


def layer_graph(weights: Mapping[str, Tensor], x: Tensor, y: Tensor, write: Write) -> bytes:
    """A serialized model from an input like `x` to an output like `y`.

    `write` records its nodes as a factored site's are recorded.
    """
    source = ir.Value(name=INPUT, shape=ir.Shape(list(x.shape)), type=ir.TensorType(from_torch(x).dtype))
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": _OPSET}, name="layer")
    model = ir.Model(graph, ir_version=_IR_VERSION)
    ops = OnnxOps("layer", _OPSET, FreshNames(model), Shapes({}))
    output = ops.computed(
        write(ops, source, {name: ops.constant(name, weight) for name, weight in weights.items()})
    )
    graph.extend(ops.take_nodes())
    graph.opset_imports.update(ops.imports)
    names = FreshNames(model)
    for value, wanted in ops.constants_read():
        value.name = names.value(wanted)
        graph.register_initializer(value)
    output.name, output.shape, output.type = (
        OUTPUT,
        ir.Shape(list(y.shape)),
        ir.TensorType(from_torch(y).dtype),
    )
    graph.outputs.append(output)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content
