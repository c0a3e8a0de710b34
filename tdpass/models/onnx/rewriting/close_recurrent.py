"""Recurrent nodes put back where steps need no factors.

They are as they were, or read what the first factors of their input make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.form import DENSE, DYNAMIC
from tdpass.formats.layer import Layer
from tdpass.formats.lowering import lower
from tdpass.models.onnx.graph.emitting import Emitter
from tdpass.models.onnx.graph.graphs import nodes_of, opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import from_torch, sizes, to_torch
from tdpass.models.onnx.rewriting.dynamic_lstm import dynamic_lstm
from tdpass.models.onnx.rewriting.recurrent import Direction, Opened
from tdpass.models.onnx.rewriting.rewrite import remove_nodes, take_place
from tdpass.models.onnx.sites.cells import B, C, H, cell_of


def close_recurrent(model: ir.Model, opened: Sequence[Opened], layers: Mapping[str, Layer]) -> frozenset[str]:
    """Put the nodes back, in place, of which no product of the hidden state is among the layers.

    What such a node reads are the first matrices of its input's layer then, and the rest of them are its
    weight; where the layer is no chain of matrices, or products were edited since, it stays open.  Returns
    the sites that are gone with what stood for them.
    """
    gone: set[str] = set()
    for record in opened:
        replaced = [name for name in record.sites if name in layers]
        of_hidden = {name for direction in record.directions for name in direction.hidden}
        chains = {name: _matrices(layers[name]) for name in replaced}
        held = model.graph.initializers
        edited = any(
            name not in held or held[name].const_value is not made for name, made in record.made.items()
        )
        whole = not edited and _reads_integers(record, layers)
        if not whole and (edited or of_hidden & set(replaced) or not all(chains.values())):
            continue
        _Closing(model, record, layers, chains, whole)()
        gone.update(record.sites)
    return frozenset(gone)


def _reads_integers(record: Opened, layers: Mapping[str, Layer]) -> bool:
    """Whether all its layers are int8 and round what they read in every call.

    One operator of ONNX Runtime does that.
    """
    forms = [layers[name].form for name in record.sites if name in layers]
    return (
        record.node.op_type == "LSTM"
        and len(forms) == len(list(record.sites))
        and all(
            form.format == DENSE.format
            and form.activations == DYNAMIC
            and not form.support
            and form.numbers in (("int8",), ("int8/tensor",))
            for form in forms
        )
    )


def _matrices(layer: Layer) -> list[Tensor]:
    """The matrices that a layer multiplies with one after another; nothing where it is no such chain."""
    lowered = None if layer.form.encoded else lower(layer)
    return [] if lowered is None else [layer.factors[name] for name in lowered.factors]


@dataclass
class _Closing:
    """One node put back."""

    model: ir.Model
    record: Opened
    layers: Mapping[str, Layer]
    chains: Mapping[str, Sequence[Tensor]]
    whole: bool

    def __call__(self) -> None:
        values = _values(self.model)
        record = self.record
        old = [values.get(name) for name in record.outputs]
        place = next(
            producer for value in old if value is not None and (producer := value.producer()) is not None
        )
        graph = place.graph
        if graph is None:  # it went with a branch that was dropped
            return
        for name, tensor in record.constants.items():
            if name not in values:
                values[name] = ir.Value(
                    name=name,
                    shape=ir.Shape(sizes(tensor)),
                    type=ir.TensorType(tensor.dtype),
                    const_value=tensor,
                )
                self.model.graph.register_initializer(values[name])
        inputs = [values[name] if name else None for name in record.inputs]
        names = FreshNames(self.model)
        emit = Emitter(self.model.graph, names, record.node.name or "recurrent", opset_of(self.model))
        made = self._made(emit, inputs)
        graph.insert_before(place, emit.take())
        producers = {value.producer(): None for value in old if value is not None}
        for before, after in zip(old, made, strict=True):
            if before is not None:
                take_place(before, after)
        for name, after in zip(record.outputs, made, strict=True):
            if name not in values:
                after.name = name  # what nothing reads, or ""
        remove_nodes(graph, [node for node in producers if node is not None])

    def _made(self, emit: Emitter, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        if self.whole:
            return self._in_integers(emit, inputs)
        if self.chains:
            return self._apart(emit, inputs)
        return emit.put(self._node(self.record.node.name, inputs, {}))

    def _in_integers(self, emit: Emitter, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        """The node whose weights are int8, and that rounds what it reads."""
        record, cell = self.record, cell_of(self.record.node)
        inner = [(direction.input, *direction.hidden) for direction in record.directions]
        weights = []
        for names in zip(*inner, strict=True):  # the input's, then those of the hidden state
            of = [self.layers[name].factors for name in names]
            codes = [cell.in_onnx_order(held["kernel"]) for held in of]
            rows = [held["kernel_scale"].expand(len(held["kernel"])) for held in of]
            scales = [cell.in_onnx_order(each) for each in rows]
            weights.append((f"{names[0]}.kernel", torch.stack(codes), torch.stack(scales)))
        biases = [[self.layers[name].bias for name in names] for names in inner]
        given = [*inputs, *(None,) * (B + 1 - len(inputs))]
        if any(bias is not None for pair in biases for bias in pair):
            halves = [
                torch.cat(
                    [self._half(bias, codes) for bias, (_, codes, _) in zip(pair, weights, strict=True)]
                )
                for pair in biases
            ]
            name = emit.free(f"{record.directions[0].input}.biases")
            given[B] = emit.held(from_torch(torch.stack(halves)), name)
        return dynamic_lstm(self.model, emit, record.node, given, weights)

    def _half(self, bias: Tensor | None, codes: Tensor) -> Tensor:
        gates = codes.shape[1]
        return torch.zeros(gates) if bias is None else cell_of(self.record.node).in_onnx_order(bias)

    def _node(
        self, name: str | None, inputs: Sequence[ir.Value | None], attributes: Mapping[str, ir.Attr]
    ) -> ir.Node:
        twin = self.record.node
        return ir.Node(
            twin.domain, twin.op_type, inputs, {**twin.attributes, **attributes}.values(),
            name=name, num_outputs=len(self.record.outputs), doc_string=twin.doc_string,
            metadata_props=dict(twin.metadata_props),
        )  # fmt: skip

    def _apart(self, emit: Emitter, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        """A node for each direction, and its outputs beside those of the other."""
        each = [self._direction(emit, inputs, k) for k in range(len(self.record.directions))]
        if len(each) == 1:
            return each[0]
        return [
            emit("Concat", *parts, axis=int(place == 0))
            for place, parts in enumerate(zip(*each, strict=True))
        ]

    def _direction(self, emit: Emitter, inputs: Sequence[ir.Value | None], k: int) -> Sequence[ir.Value]:
        record, direction = self.record, self.record.directions[k]
        w, r, b = record.weights.w, record.weights.r, record.weights.b
        x = inputs[0]
        assert x is not None
        weight, bias = to_torch(w)[k], None if b is None else to_torch(b)[k]
        chain = self.chains.get(direction.input)
        if chain:
            widths = [matrix.shape[0] for matrix in chain[:-1]]
            cut = 1 + widths.index(min(widths)) if widths else 0
            for matrix in chain[:cut]:
                x = emit("MatMul", x, self._held(emit, direction, "v", matrix.T))
            rest = reduce(lambda product, matrix: matrix @ product, chain[cut:])
            weight = cell_of(record.node).in_onnx_order(rest)
            bias = self._bias(direction, bias, weight)
        own = [
            x,
            self._held(emit, direction, "w", weight.unsqueeze(0)),
            self._held(emit, direction, "r", to_torch(r)[k].unsqueeze(0)),
            None if bias is None else self._held(emit, direction, "b", bias.unsqueeze(0)),
            *inputs[B + 1 : H],
            *(
                None if state is None else emit("Gather", state, emit.ints((k,)), axis=0)
                for state in inputs[H : C + 1]
            ),
        ][: max(len(inputs), B + 1)]
        said = ir.AttrString("direction", "reverse" if direction.reverse else "forward")
        return emit.put(
            self._node(f"{record.node.name or 'recurrent'}/{said.value}", own, {"direction": said})
        )

    def _bias(self, direction: Direction, bias: Tensor | None, weight: Tensor) -> Tensor | None:
        """The node's bias, with that of the input's layer in its first half."""
        given = self.layers[direction.input].bias
        if given is None and bias is None:
            return None
        first = torch.zeros(len(weight), dtype=weight.dtype) if given is None else given.to(weight.dtype)
        second = torch.zeros_like(first) if bias is None else bias.chunk(2)[1].to(weight.dtype)
        return torch.cat([cell_of(self.record.node).in_onnx_order(first), second])

    def _held(self, emit: Emitter, direction: Direction, label: str, tensor: Tensor) -> ir.Value:
        held = from_torch(tensor.contiguous())
        return emit.held(held, emit.free(f"{direction.input}.{label}"))


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """All values of the main graph and the graphs in it, by name."""
    found: dict[str, ir.Value] = {}
    for graph in model.graphs():
        found.update(
            (value.name, value) for value in (*graph.inputs, *graph.initializers.values()) if value.name
        )
    for node in nodes_of(model):
        found.update((value.name, value) for value in node.outputs if value.name)
    return found
