"""How long recurrent nodes take whose steps multiply with factors, beside the nodes that they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from tdpass.fusing.choose import seconds_of
from tdpass.models.onnx.graph.tensors import from_torch, lent, sizes
from tdpass.models.onnx.operators.session import Session
from tdpass.models.onnx.rewriting.integer_activations import watched
from tdpass.models.onnx.rewriting.recurrent import Opened
from tdpass.models.onnx.sites.cells import B, R, W

_IR = 8


@dataclass(frozen=True)
class _Node:
    """A node that stays open, with what it reads and makes in the model that it was rewritten to."""

    record: Opened
    reads: tuple[ir.Value, ...]
    makes: tuple[ir.Value, ...]

    def dense(self, model: ir.Model, inputs: Mapping[str, Tensor]) -> ir.Model:
        """A model of the node as it was."""
        record, held = self.record, self.record.weights
        read = {name: _value(name, tensor) for name, tensor in inputs.items()}
        weights = {place: stored for place, stored in ((W, held.w), (R, held.r), (B, held.b)) if stored}
        constants = {
            place: ir.Value(
                name=f"weight_{place}",
                shape=ir.Shape(sizes(stored)),
                type=ir.TensorType(stored.dtype),
                const_value=lent(stored),
            )
            for place, stored in weights.items()
        }
        given = [constants.get(place) or read.get(name) for place, name in enumerate(record.inputs)]
        twin = record.node
        node = ir.Node(
            twin.domain, twin.op_type, given, list(twin.attributes.values()), num_outputs=len(record.outputs)
        )
        for output, name in zip(node.outputs, record.outputs, strict=True):
            output.name = name
        kept = {value.name for value in self.makes}
        outputs = [output for output in node.outputs if output.name in kept]
        for output in outputs:
            output.type = ir.TensorType(held.w.dtype)
        opsets = dict(model.opset_imports)
        graph = ir.Graph(
            list(read.values()), outputs, nodes=[node], initializers=list(constants.values()),
            opset_imports=opsets, name="node"
        )  # fmt: skip
        return ir.Model(graph, ir_version=_IR)

    def now(self, model: ir.Model, inputs: Mapping[str, Tensor]) -> ir.Model:
        """A model of what took its place."""
        graph = ir.convenience.extract(model.graph, list(self.reads), list(self.makes))
        for value in graph.inputs:
            value.shape = ir.Shape(list(inputs[str(value.name)].shape))
            value.type = ir.TensorType(from_torch(inputs[str(value.name)]).dtype)
        for value in graph.outputs:
            value.shape, value.type = None, ir.TensorType(self.record.weights.w.dtype)
        return ir.Model(
            graph, functions=list(model.functions.values()), ir_version=max(model.ir_version or 0, _IR)
        )


def recurrent_times(
    model: ir.Model, opened: Sequence[Opened], replaced: Mapping[str, object], inputs: Mapping[str, Tensor]
) -> Iterator[tuple[str, float, float]]:
    """Of every node in the main graph whose steps have factors, its name and two times.

    They are its seconds as it was, and those that it takes. On one thread, on what the model gives it to read
    for these inputs.
    """
    values = {str(value.name): value for value in model.graph.inputs}
    values |= {str(value.name): value for node in model.graph for value in node.outputs}
    for record in opened:
        hidden = {name for direction in record.directions for name in direction.hidden}
        reads = tuple(values[name] for name in dict.fromkeys(record.inputs) if name in values)
        makes = tuple(values[name] for name in record.outputs if name in values)
        if hidden & set(replaced) and makes:
            found = _Node(record, reads, makes)
            seen = watched(model, [str(value.name) for value in reads])(inputs)
            given = {
                str(value.name): seen.get(str(value.name), inputs.get(str(value.name))) for value in reads
            }
            held = {name: tensor for name, tensor in given.items() if tensor is not None}
            calls = {
                way: Session(made, threads=1).bound(held)
                for way, made in (("dense", found.dense(model, held)), ("now", found.now(model, held)))
            }
            times = seconds_of(calls, 1)
            yield record.node.name or record.node.op_type, times["dense"], times["now"]


def _value(name: str, tensor: Tensor) -> ir.Value:
    kind = ir.TensorType(from_torch(tensor).dtype)
    return ir.Value(name=name, shape=ir.Shape(list(tensor.shape)), type=kind)
