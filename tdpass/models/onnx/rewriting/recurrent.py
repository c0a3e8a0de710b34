"""Recurrent nodes as matrix products over the sequence and a Scan over steps, so each product is a layer.

Names and the order of gates are those of torch, so that one plan serves the models of both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir
from torch import Tensor

from tdpass.models.onnx.graph.emitting import Emitter
from tdpass.models.onnx.graph.folding import number_sources
from tdpass.models.onnx.graph.graphs import nodes_of, opset_of
from tdpass.models.onnx.graph.names import FreshNames, places_of
from tdpass.models.onnx.graph.tensors import from_torch, sizes, to_torch
from tdpass.models.onnx.rewriting.rewrite import take_place
from tdpass.models.onnx.sites.cells import (
    LENGTHS,
    OPERATORS,
    B,
    C,
    Cell,
    H,
    P,
    Product,
    Step,
    W,
    Weights,
    X,
    activations,
    cell_of,
    why_closed,
)

_OF_TORCH = re.compile(r"(?P<path>.*?)\.?weight_ih(?P<layer>_l\d+)")


@dataclass(frozen=True)
class Direction:
    """One direction of an opened node: its products' sites, and whether it runs from the last step."""

    input: str
    hidden: tuple[str, ...]
    reverse: bool


@dataclass(frozen=True)
class Opened:
    """A recurrent node that was opened: a copy without what it read, the names of that and of what it made.

    `constants` are those of its weights that were initializers, by name, which
    nothing may read any more; `made` are the weights and biases of its products, as they were made of these.
    """

    node: ir.Node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Weights
    constants: Mapping[str, ir.TensorProtocol]
    made: Mapping[str, ir.TensorProtocol]
    directions: tuple[Direction, ...]

    @property
    def sites(self) -> Iterator[str]:
        """The names of all its sites."""
        for direction in self.directions:
            yield from (direction.input, *direction.hidden)


def open_recurrent(model: ir.Model) -> tuple[Opened, ...]:
    """Open every recurrent node of a model in place, in branches and bodies too; returns what they were."""
    opset, names, layers = opset_of(model), FreshNames(model), dict[str, int]()
    found = []
    for node in nodes_of(model):
        if node.domain or node.op_type not in OPERATORS or why_closed(node, opset):
            continue
        path, layer = _name(node)
        if not layer:
            layers[path] = layers.get(path, -1) + 1
            layer = f"_l{layers[path]}"
        emit = Emitter(model.graph, names, node.name or f"{path}{layer}", opset)
        found.append(_Opening(node, path, layer, names, emit)())
    return tuple(found)


def _name(node: ir.Node) -> tuple[str, str]:
    """Where torch had the layer, and which of its layers it is, where the names of its weights say that."""
    weight = node.inputs[W]
    assert weight is not None
    for source in number_sources(weight):
        said = _OF_TORCH.match(source.name or "")
        if said is not None:
            return said["path"] or node.op_type.lower(), said["layer"]
    return next(iter(places_of(node)), node.op_type.lower()), ""


@dataclass(frozen=True)
class _Slice:
    """What a product of direction `k` takes of a node's weights.

    It takes all of the input's, or some gates of the hidden state's.
    """

    cell: Cell
    k: int
    gates: tuple[int, ...] | None = None

    def outputs(self, rows: int) -> int:
        """How many of the rows of a stored weight it takes."""
        return rows if self.gates is None else rows // len(self.cell.order) * len(self.gates)

    def columns(self, stored: ir.TensorProtocol) -> ir.TensorProtocol:
        """The weight `[i, (gates hidden)]`, its gates in torch's order."""
        return from_torch(self.cell.in_torch_order(to_torch(stored)[self.k], self.gates).T.contiguous())

    def shift(self, stored: ir.TensorProtocol) -> ir.TensorProtocol:
        """The bias, of which the first half is the input's."""
        half: Tensor = to_torch(stored)[self.k].chunk(2)[int(self.gates is not None)]
        return from_torch(self.cell.in_torch_order(half, self.gates).contiguous())


@dataclass
class _Opening:
    """The nodes that take the place of one."""

    node: ir.Node
    path: str
    layer: str
    names: FreshNames
    emit: Emitter
    made: dict[str, ir.TensorProtocol] = field(default_factory=dict)

    def __call__(self) -> Opened:
        node, graph, cell = self.node, self.node.graph, cell_of(self.node)
        assert graph is not None
        self.given = [*node.inputs, *(None,) * (P + 1 - len(node.inputs))]
        weights = Weights.of(node)
        said = node.attributes.get_string("direction", "forward")
        ways = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[said]
        directions = tuple(self._direction(cell, reverse=reverse) for reverse in ways)
        made = [self._run(cell, direction, k, weights) for k, direction in enumerate(directions)]
        outputs = {
            old: self.emit.together([one[place] for one in made], int(place == 0))
            for place, old in enumerate(node.outputs)
            if old.uses() or old.is_graph_output()
        }
        record = self._record(weights, directions)
        graph.insert_before(node, self.emit.take())
        for old, new in outputs.items():
            take_place(old, new)
        graph.remove(node, safe=True)
        return record

    def _record(self, weights: Weights, directions: tuple[Direction, ...]) -> Opened:
        node = self.node
        held = [value for value in self.given[W : B + 1] if value is not None and value.is_initializer()]
        twin = ir.Node(
            node.domain, node.op_type, [None] * len(node.inputs), list(node.attributes.values()),
            name=node.name, num_outputs=len(node.outputs), doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        return Opened(
            twin,
            tuple("" if value is None else value.name or "" for value in node.inputs),
            tuple(value.name or "" for value in node.outputs),
            weights,
            {value.name or "": value.const_value for value in held if value.const_value is not None},
            dict(self.made),
            directions,
        )

    def _direction(self, cell: Cell, *, reverse: bool) -> Direction:
        end = f"{self.layer}{'_reverse' * reverse}"
        hidden = tuple(self._free(f"{self.path}.{part}{end}") for part in cell.parts)
        return Direction(self._free(f"{self.path}.input{end}"), hidden, reverse)

    def _free(self, wanted: str) -> str:
        return self.names.value(f"{wanted}.weight").removesuffix(".weight")

    def _run(self, cell: Cell, direction: Direction, k: int, weights: Weights) -> list[ir.Value]:
        """What one direction makes: all hidden states, then the last of every state."""
        emit, (x, lengths) = self.emit, (self.given[X], self.given[LENGTHS])
        assert x is not None
        hidden, kind = weights.hidden, weights.r.dtype
        pre = self._product(direction.input, weights.w, weights.b, _Slice(cell, k))(emit)(x)
        makers = [
            self._product(name, weights.r, weights.b, _Slice(cell, k, tuple(gates)))
            for name, gates in zip(direction.hidden, cell.parts.values(), strict=True)
        ]
        states = [
            self._zeros(x, hidden, kind) if given is None else emit("Gather", given, emit.ints(k), axis=0)
            for given in (self.given[H], self.given[C])[: cell.states]
        ]
        clip = self.node.attributes.get_float("clip", 0.0)
        usual = activations(self.node)
        inner = Step(emit.within(), usual[k * len(cell.usual)], clip)
        steps = Steps(cell, inner, [make(inner.emit) for make in makers], hidden, kind)
        if lengths is None:
            return steps.scan(emit, pre, states, reverse=direction.reverse)
        return steps.scan_of_lengths(emit, pre, states, lengths, reverse=direction.reverse)

    def _product(
        self, name: str, stored: ir.TensorProtocol, bias: ir.TensorProtocol | None, part: _Slice
    ) -> Callable[[Emitter], Product]:
        """What makes a product of a direction by nodes of some emitter."""
        inputs, outputs = sizes(stored)[2], part.outputs(sizes(stored)[1])
        weight = self.emit.lazy(
            f"{name}.weight", stored.dtype, (inputs, outputs), partial(part.columns, stored)
        )
        self._note(weight)
        shift = None
        if bias is not None:
            named = self.names.value(f"{name}.bias")
            shift = self.emit.lazy(named, bias.dtype, (outputs,), partial(part.shift, bias))
            self._note(shift)

        def by(emit: Emitter) -> Product:
            def product(x: ir.Value) -> ir.Value:
                y = emit("MatMul", x, weight)
                return y if shift is None else emit("Add", y, shift)

            return product

        return by

    def _note(self, value: ir.Value) -> None:
        assert value.name is not None
        assert value.const_value is not None
        self.made[value.name] = value.const_value

    def _zeros(self, x: ir.Value, hidden: int, dtype: ir.DataType) -> ir.Value:
        """A state `[n, hidden]` of zeros, for the samples of `x[t, n, i]`."""
        emit = self.emit
        samples = emit("Gather", emit("Shape", x), emit.ints((1,)), axis=0)
        shape = emit("Concat", samples, emit.ints((hidden,)), axis=0)
        return emit("ConstantOfShape", shape, value=ir.tensor([0.0], dtype))


@dataclass(frozen=True)
class Steps:
    """The steps of one direction as a Scan."""

    cell: Cell
    step: Step
    products: Sequence[Product]
    hidden: int
    dtype: ir.DataType

    def scan(
        self, emit: Emitter, pre: ir.Value, states: Sequence[ir.Value], *, reverse: bool
    ) -> list[ir.Value]:
        """All hidden states, then the last of every state."""
        inner = self.step.emit
        held, part = self._inputs(inner)
        after = list(self.cell.step(self.step, part, self.products, held))
        seen = inner("Identity", after[0])
        body = inner.body(inner.take(), [*held, part], [*after, seen])
        return self._scan(emit, [*states, pre], 1, body, reverse=reverse)

    def scan_of_lengths(
        self, emit: Emitter, pre: ir.Value, states: Sequence[ir.Value], lengths: ir.Value, *, reverse: bool
    ) -> list[ir.Value]:
        """The same of sequences that are over after so many steps: states stay, and outputs are zero."""
        inner = self.step.emit
        ends = emit("Cast", lengths, to=ir.DataType.INT64)
        if reverse:
            pre = emit("ReverseSequence", pre, ends, time_axis=0, batch_axis=1)
        count = emit("Gather", emit("Shape", pre), emit.ints(0), axis=0)
        steps = emit("Range", emit.ints(0), count, emit.ints(1))
        goes_on = emit("Less", emit.unsqueezed(steps, 1), emit.unsqueezed(ends, 0))
        held, part = self._inputs(inner)
        runs = inner.value("runs", (None, 1), ir.DataType.BOOL)
        fresh = self.cell.step(self.step, part, self.products, held)
        after = [inner("Where", runs, new, old) for new, old in zip(fresh, held, strict=True)]
        seen = inner("Mul", after[0], inner("Cast", runs, to=self.dtype))
        body = inner.body(inner.take(), [*held, part, runs], [*after, seen])
        y, *last = self._scan(emit, [*states, pre, emit.unsqueezed(goes_on, 2)], 2, body, reverse=False)
        return [emit("ReverseSequence", y, ends, time_axis=0, batch_axis=1) if reverse else y, *last]

    def _inputs(self, inner: Emitter) -> tuple[list[ir.Value], ir.Value]:
        held = [inner.value("state", (None, self.hidden), self.dtype) for _ in range(self.cell.states)]
        return held, inner.value("gates", (None, len(self.cell.order) * self.hidden), self.dtype)

    def _scan(
        self, emit: Emitter, inputs: Sequence[ir.Value], sequences: int, body: ir.Graph, *, reverse: bool
    ) -> list[ir.Value]:
        ways = {"scan_input_directions": [1], "scan_output_directions": [1]} if reverse else {}
        for made in body.outputs:  # ONNX Runtime wants them, and derives none from all that a step may hold
            made.shape, made.type = ir.Shape([None, self.hidden]), ir.TensorType(self.dtype)
        *last, y = emit.several(
            "Scan", inputs, self.cell.states + 1, body=body, num_scan_inputs=sequences, **ways
        )
        return [y, *last]
