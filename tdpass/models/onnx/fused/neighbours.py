"""Layers that read what another makes: what either costs depends on how the other runs.

ONNX Runtime keeps its own convolutions in a layout of its own, which it changes before and after an operator
that is not its own; between two such operators, as between two of its own, nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from tdpass.models.onnx.fused.parts import Part
from tdpass.models.onnx.graph.folding import folded

_SUM = "Add"
_PASSED = frozenset({"QuantizeLinear", "DequantizeLinear", "MaxPool", "Relu", "Clip", "Identity", _SUM})
_LAID_OUT = frozenset({"Conv", "ConvInteger"})


@dataclass(frozen=True)
class Layer:
    """A part, or a convolution that is none: what it reads but constants, makes, and the nodes it is."""

    spec: str
    nodes: tuple[ir.Node, ...]
    reads: tuple[ir.Value, ...]
    makes: tuple[ir.Value, ...]

    @classmethod
    def of(cls, part: Part) -> Layer:
        """The layer that a part is."""
        return cls(part.spec, part.nodes, part.reads, part.makes)

    @property
    def key(self) -> str:
        """The name of the first value that it makes."""
        return str(self.makes[0].name)


@dataclass(frozen=True)
class Neighbours:
    """Two layers, the second of which reads what the first makes, or what the nodes between make of it."""

    first: Layer
    between: tuple[ir.Node, ...]
    second: Layer

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        """What both, and what lies between them, read but constants and each other."""
        inner = {*self.first.makes, *(node.outputs[0] for node in self.between)}
        added = [value for node in self.between if node.op_type == _SUM for value in node.inputs]
        read = (*self.first.reads, *added, *self.second.reads)
        return tuple(
            dict.fromkeys(
                value for value in read if value is not None and value not in inner and folded(value) is None
            )
        )

    @property
    def makes(self) -> tuple[ir.Value, ...]:
        """What the second makes, and what others read of what lies between them."""
        inside = {*self.first.nodes, *self.between, *self.second.nodes}
        inner = (*self.first.makes, *(node.outputs[0] for node in self.between))
        kept = [
            value
            for value in inner
            if value.is_graph_output() or any(use.node not in inside for use in value.uses())
        ]
        return (*kept, *self.second.makes)

    def __str__(self) -> str:
        passed = ", ".join(f"{node.op_type} {dict(node.attributes)}" for node in self.between)
        return f"{self.first.spec}; {passed}; {self.second.spec}, {len(self.makes)} made"


def neighbours(model: ir.Model, parts: Sequence[Part]) -> list[Neighbours]:
    """All pairs of neighbours in the main graph of which one at least is a part."""
    layers = [Layer.of(part) for part in parts]
    taken = {node for layer in layers for node in layer.nodes}
    plain = [_plain(node) for node in model.graph if node.op_type in _LAID_OUT and node not in taken]
    makers = {value: layer for layer in (*layers, *plain) for value in layer.makes}
    found = [pair for layer in (*layers, *plain) for pair in _before(layer, makers)]
    return [pair for pair in found if pair.first in layers or pair.second in layers]


def _plain(node: ir.Node) -> Layer:
    weight = None if len(node.inputs) < 2 else node.inputs[1]
    shape = None if weight is None else weight.shape
    spec = f"{node.op_type} {None if shape is None else list(shape)} {dict(node.attributes)}"
    reads = tuple(value for value in node.inputs[:1] if value is not None)
    return Layer(spec, (node,), reads, tuple(node.outputs[:1]))


def _before(layer: Layer, makers: Mapping[ir.Value, Layer]) -> Iterator[Neighbours]:
    """The layers whose results a layer reads."""
    for value in layer.reads:
        for source, between in _sources(value, makers, 1):
            if source is not layer:
                yield Neighbours(source, between, layer)


def _sources(
    value: ir.Value | None, makers: Mapping[ir.Value, Layer], sums: int
) -> Iterator[tuple[Layer, tuple[ir.Node, ...]]]:
    """The layers that a value comes from through at most so many sums, and the nodes that pass it on."""
    if value is None:
        return
    if value in makers:
        yield makers[value], ()
        return
    node = value.producer()
    if node is None or node.op_type not in _PASSED:
        return
    sums -= node.op_type == _SUM
    if sums >= 0:
        for before in node.inputs[: 2 if node.op_type == _SUM else 1]:
            for source, between in _sources(before, makers, sums):
                yield source, (*between, node)
