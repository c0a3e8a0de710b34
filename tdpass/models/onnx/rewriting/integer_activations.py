"""Activations of eight bits.

Tensors between layers whose weights are integers pass through QuantizeLinear and DequantizeLinear. ONNX
Runtime, OpenVINO and TensorRT make integer operators of what stands between such pairs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.models.abilities import Range
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import constant, dims, from_torch
from tdpass.models.onnx.operators.session import Session

PER_CHANNEL_SINCE = 13
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVES = frozenset({"Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool"})
_JOINS = frozenset({"Add", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean"})
_SUMS = frozenset({"ReduceMean", "ReduceSum"})
# a runtime may compute these before it multiplies codes with their scale
_REARRANGES = _MOVES | {"Concat", "Expand", "Gather", "Identity", "Pad", "Slice", "Split"}
_MAP = 4  # axes of samples, channels and places


def integer_layers(model: ir.Model) -> dict[str, ir.Node]:
    """The layers whose weights are int8 and that do not read integers already, by the name of the weight."""
    found = {}
    for node in model.graph:
        if node.op_type in _LAYERS and not node.domain and len(node.inputs) > 1:
            values = _integers(node.inputs[1])
            if values is not None and not _from_integers(node.inputs[0]) and not _stacked(node):
                found[str(values.name)] = node
    return found


def quantizable(model: ir.Model, without: Container[str] = ()) -> list[str]:
    """The tensors that may be integers: what these layers read and make, and what only moves or joins such.

    Not the model's outputs.
    """
    layers = [node for name, node in integer_layers(model).items() if name not in without]
    chosen = {value for node in layers for value in (node.inputs[0], _made(node)) if value is not None}
    for node in model.graph:  # in order, so that one walk carries everything forward
        if node.domain or node.op_type not in _MOVES | _JOINS or _adds_up(node):
            continue
        read = [
            value
            for value in (node.inputs if node.op_type in _JOINS - {"ReduceMean"} else node.inputs[:1])
            if value is not None
        ]
        if read and all(value in chosen for value in read):
            chosen.add(_made(node))
    for node in (node for node in model.graph if _stacked(node) or _adds_up(node)):
        chosen.difference_update(_moved(node.inputs[0]))
    outputs = set(model.graph.outputs)
    return [
        str(value.name)
        for value in _values(model)
        if value in chosen and value not in outputs and _float(value)
    ]


def watched(model: ir.Model, names: Sequence[str]) -> Session:
    """A session of a copy of the model that answers with these tensors."""
    copy = model.clone()
    by_name = {str(value.name): value for value in _values(copy)}
    kept = {str(value.name) for value in copy.graph.outputs}
    copy.graph.outputs.extend(by_name[name] for name in names if name not in kept)
    return Session(copy)


def with_integer_activations(model: ir.Model, ranges: Mapping[str, Range]) -> ir.Model:
    """The model, changed in place: the tensors named pass through eight bits.

    A Relu that alone reads a tensor goes, since the range has its lower end at zero: what is cut there is
    what Relu cuts.
    """
    names = FreshNames(model)
    for value in list(_values(model)):
        found = ranges.get(str(value.name))
        if found is None:
            continue
        relu = _only_relu_before(value)
        place = value if relu is None else relu.inputs[0]
        assert place is not None
        _put(model, value, place, found, names)
    return model


def check_opset(model: ir.Model) -> None:
    """Raises `UnsupportedError` where the operators that are needed are missing."""
    if opset_of(model) < PER_CHANNEL_SINCE:
        raise UnsupportedError(
            f"the model is of opset {opset_of(model)}, in which DequantizeLinear takes no scale per channel; "
            f"convert it to opset {PER_CHANNEL_SINCE} or later with onnx.version_converter"
        )


def _put(model: ir.Model, value: ir.Value, place: ir.Value, found: Range, names: FreshNames) -> None:
    """Let the readers of `value` read `place` through eight bits."""
    label = str(value.name)
    scale = _constant(model, f"{label}_scale", torch.tensor(found.scale), names)
    zero = _constant(model, f"{label}_zero", torch.tensor(found.zero, dtype=torch.uint8), names)
    coded = ir.node("QuantizeLinear", [place, scale, zero], name=names.node(f"{label}/quantize"))
    decoded = ir.node(
        "DequantizeLinear", [coded.outputs[0], scale, zero], name=names.node(f"{label}/dequantize")
    )
    for node, noun in ((coded, "codes"), (decoded, "numbers")):
        node.outputs[0].name = names.value(f"{label}_{noun}")
        node.outputs[0].shape = value.shape
    coded.outputs[0].type, decoded.outputs[0].type = ir.TensorType(ir.DataType.UINT8), value.type
    value.replace_all_uses_with(decoded.outputs[0])
    if place is value:
        coded.replace_input_with(0, value)
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [coded, decoded])
    else:
        model.graph.insert_after(producer, [coded, decoded])
    if place is not value and producer is not None:
        model.graph.remove(producer, safe=True)


def _constant(model: ir.Model, wanted: str, tensor: Tensor, names: FreshNames) -> ir.Value:
    held = from_torch(tensor)
    value = ir.Value(
        name=names.value(wanted), shape=ir.Shape([]), type=ir.TensorType(held.dtype), const_value=held
    )
    model.graph.register_initializer(value)
    return value


def _integers(weight: ir.Value | None) -> ir.Value | None:
    """The int8 constant that a weight is dequantized from."""
    node = None if weight is None else weight.producer()
    while node is not None and node.op_type in {"Transpose", "Reshape"}:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if (
        node is None
        or node.op_type != "DequantizeLinear"
        or node.inputs[0] is None
        or not node.inputs[0].is_initializer()
    ):
        return None
    return node.inputs[0] if node.inputs[0].dtype == ir.DataType.INT8 else None


def _stacked(node: ir.Node) -> bool:
    """Whether it multiplies with several int8 matrices at once, which ONNX Runtime takes for one, and fails."""
    weight = node.inputs[1] if node.op_type == "MatMul" and len(node.inputs) > 1 else None
    return _integers(weight) is not None and weight is not None and _axes(weight) > 2


def _adds_up(node: ir.Node) -> bool:
    """Whether it adds up over other axes than the places of a map.

    OpenVINO 2026.4 does that on bytes, and answers wrong for some sizes.
    """
    value = node.inputs[0] if node.op_type in _SUMS and not node.domain else None
    if value is None:
        return False
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.attributes.get_ints("axes", ()) if given is None else given.numpy().tolist()
    rank = len(dims(value) or ())
    return rank < _MAP or {axis % rank for axis in axes} != set(range(2, rank))


def _axes(weight: ir.Value) -> int:
    """How many axes a weight has that `_integers` knows the constant of."""
    node = weight.producer()
    if node is None or node.inputs[0] is None:
        return len(weight.shape or ())
    shape = constant(node.inputs[1]) if node.op_type == "Reshape" and node.inputs[1] is not None else None
    return _axes(node.inputs[0]) if shape is None else shape.size


def _moved(value: ir.Value | None) -> Iterator[ir.Value]:
    """The value, and what is only moved to make it."""
    if value is None:
        return
    yield value
    producer = value.producer()
    if producer is not None and producer.op_type in _REARRANGES and not producer.domain:
        for given in producer.inputs:
            yield from _moved(given)


def _from_integers(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _made(node: ir.Node) -> ir.Value:
    """What a node makes, behind the bias of a matrix product and the Relu where these alone read it."""
    value, reader = node.outputs[0], _only_reader(node.outputs[0])
    if (
        node.op_type == "MatMul"
        and reader is not None
        and reader.op_type == "Add"
        and any(map(_is_constant, reader.inputs))
    ):
        value, reader = reader.outputs[0], _only_reader(reader.outputs[0])
    return reader.outputs[0] if reader is not None and reader.op_type == "Relu" else value


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return (
        uses[0].node if len(uses) == 1 and not uses[0].node.domain and not value.is_graph_output() else None
    )


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and constant(value) is not None


def _only_relu_before(value: ir.Value) -> ir.Node | None:
    """The Relu that makes a value, where nothing else reads what it reads."""
    node = value.producer()
    if node is None or node.op_type != "Relu" or node.inputs[0] is None or node.inputs[0].is_graph_input():
        return None
    return node if len(list(node.inputs[0].uses())) == 1 and not node.inputs[0].is_graph_output() else None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from (value for value in model.graph.inputs if not value.is_initializer())
    for node in model.graph:
        yield from node.outputs


def _float(value: ir.Value) -> bool:
    return value.dtype in {None, ir.DataType.FLOAT}
