"""Sizes of values before running, and the skeleton of a model to infer and check them on cheaply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from tdpass.models.onnx.graph.protos import graph_protos
from tdpass.models.onnx.graph.tensors import dims, sizes

Dims = tuple[int | None, ...]
_SMALL = 1024
_STAND_IN = "tdpass:{}:{}"  # a name that no exporter gives


def put_in_order(model: ir.Model) -> None:
    """Sort nodes behind what they read, and let local functions use the operators of the model's versions.

    Runtimes let them too. ONNX Runtime inlines a function without looking at the versions that it names.
    Raises `ValueError` for a cyclic graph.
    """
    model.graph.sort()
    for function in model.functions.values():
        function.sort()
        function.opset_imports.update(
            {
                domain: model.opset_imports[domain]
                for domain in function.opset_imports
                if domain in model.opset_imports
            }
        )


def ordered(model: ir.Model) -> ir.Model:
    """A copy in order that shares the weights; raises `ValueError` for a cyclic graph."""
    try:
        copy = model.clone()
    except RuntimeError:  # only what is in order can be cloned
        copy = ir.from_proto(ir.to_proto(model))
    put_in_order(copy)
    return copy


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without the contents of its large initializers, which become inputs.

    Checking and inferring shapes need the structure and the small integer constants only; this way neither
    serializes the weights, of which there may be more than the 2 GiB that a protobuf can hold.
    """
    copy = ordered(model)
    graph = copy.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SMALL:
            continue
        if not value.is_graph_input():
            value.shape = ir.Shape(sizes(tensor))
            value.type = value.type or ir.TensorType(tensor.dtype)
            graph.inputs.append(value)
        del graph.initializers[name]
    return ir.to_proto(copy)


def fill_shapes(proto: onnx.ModelProto) -> None:
    """Make a model fit for the checker, which insists on a shape of every input and output.

    Runtimes do not insist on it. An output gets the shape that follows from the graph.  What has none even so
    becomes something equivalent that has one: an input the result of a Reshape by a shape that is an input
    too, of an output its Shape is the output.
    """
    names = {value.name for value in proto.graph.initializer}
    for value in [value for value in proto.graph.input if _lacks_shape(value) and value.name not in names]:
        _reshape_into(proto.graph, value)
    missing = [output for output in proto.graph.output if _lacks_shape(output)]
    if not missing:
        return
    given = {value.name: value.type.tensor_type.shape for value in proto.graph.input}
    given.update(
        (tensor.name, onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type.shape)
        for tensor in proto.graph.initializer
    )
    for output in missing:
        if output.name in given:
            output.type.tensor_type.shape.CopyFrom(given[output.name])
    inferred = {
        output.name: output
        for output in onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.output
    }
    for output in missing:
        if _lacks_shape(inferred[output.name]):
            _shape_instead_of(proto.graph, output)
        else:
            output.type.tensor_type.shape.CopyFrom(inferred[output.name].type.tensor_type.shape)
            output.type.tensor_type.shape.SetInParent()


def _lacks_shape(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")


def _reshape_into(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> None:
    """Let a value be made from a flat input and an input of sizes."""
    flat, sizes_name = _STAND_IN.format(value.name, "numbers"), _STAND_IN.format(value.name, "sizes")
    graph.node.insert(0, onnx.helper.make_node("Reshape", [flat, sizes_name], [value.name]))
    graph.input.append(onnx.helper.make_tensor_value_info(flat, value.type.tensor_type.elem_type, [None]))
    graph.input.append(onnx.helper.make_tensor_value_info(sizes_name, onnx.TensorProto.INT64, [None]))
    graph.input.remove(value)


def _shape_instead_of(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> None:
    """Let the sizes of a value be the output in its place."""
    made = _STAND_IN.format(value.name, "shape")
    graph.node.append(onnx.helper.make_node("Shape", [value.name], [made]))
    graph.output.append(onnx.helper.make_tensor_value_info(made, onnx.TensorProto.INT64, [None]))
    graph.output.remove(value)


def _declared(graph: onnx.GraphProto) -> Iterator[tuple[str, Dims]]:
    """The sizes that a graph says its values have."""
    for info in (*graph.input, *graph.output, *graph.value_info):
        tensor = info.type.tensor_type
        if tensor.HasField("shape"):
            yield (
                info.name,
                tuple(
                    size.dim_value if size.HasField("dim_value") and size.dim_value >= 0 else None
                    for size in tensor.shape.dim
                ),
            )


class Shapes:
    """Sizes of the values of a model, by name, as far as they follow from the inputs' declared sizes."""

    def __init__(self, known: Mapping[str, Dims]) -> None:
        self._known = dict(known)

    @classmethod
    def infer(cls, model: ir.Model) -> Shapes:
        """Infer the sizes; where inference fails, what the model declares remains."""
        try:
            inferred = onnx.shape_inference.infer_shapes(skeleton(model), data_prop=True)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError):
            return cls({})
        known: dict[str, Dims] = {}
        several: set[str] = set()  # branches may give one name to values of their own
        for graph in graph_protos(inferred):
            for name, sizes_there in _declared(graph):
                if known.setdefault(name, sizes_there) != sizes_there:
                    several.add(name)
        return cls({name: found for name, found in known.items() if name not in several})

    def of(self, value: ir.Value) -> Dims | None:
        """Sizes, None for each that is unknown; None where even the rank is."""
        known = self._known.get(value.name or "")
        return known if known is not None else dims(value)

    def rank(self, value: ir.Value) -> int | None:
        """Number of axes."""
        known = self.of(value)
        return None if known is None else len(known)
