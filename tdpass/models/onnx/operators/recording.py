"""Nodes as they are recorded for one site, and the constants that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.shapes import Dims, Shapes
from tdpass.models.onnx.graph.tensors import from_torch


class Recording:
    """Nodes, the constants of which they make initializers, and what is known of the sizes of values."""

    def __init__(
        self,
        site: str,
        opset: int,
        names: FreshNames,
        shapes: Shapes,
        *,
        integers: bool = False,
        dynamic: bool = False,
    ) -> None:
        self._site = site
        self._opset = opset
        self._integers_run = integers or dynamic
        self._dynamic = dynamic
        self._names = names
        self._shapes = shapes
        self._nodes: list[ir.Node] = []
        self._contents: dict[ir.Value, Tensor] = {}
        self._fixed: dict[ir.Value, Tensor] = {}
        self._integers: dict[ir.Value, Tensor] = {}
        self._labels: dict[ir.Value, str] = {}
        self._rearranged: dict[tuple[object, ...], ir.Value] = {}
        self._read: dict[ir.Value, None] = {}
        self._dims: dict[ir.Value, Dims | None] = {}
        self._halves: dict[ir.Value, ir.Value] = {}
        self._grouped: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value | None, int]] = {}
        self._imports: dict[str, int] = {}
        self._sources: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value | None, int]] = {}

    def constant(
        self, label: str, tensor: Tensor, properties: Mapping[str, str] | None = None, *, fixed: bool = False
    ) -> ir.Value:
        """A constant to be named `<site>.<label>` if a node reads it, with these properties beside it.

        A `fixed` one is read in several layouts and stored in this: nodes lay it out anew.
        """
        held = from_torch(tensor)
        value = ir.Value(shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held)
        value.metadata_props.update(properties or {})
        (self._fixed if fixed else self._contents)[value] = tensor
        self._labels[value] = label
        self._dims[value] = tuple(tensor.shape)
        return value

    def take_nodes(self) -> list[ir.Node]:
        """The nodes recorded since the last call."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def computed(self, y: ir.Value) -> ir.Value:
        """The value as the output of a node, which a constant is not."""
        return self._emit("Identity", [y], self._dims_of(y)) if y in self._contents else y

    def constants_read(self) -> list[tuple[ir.Value, str]]:
        """Every constant that some node still reads, with the name it would like."""
        return [(value, f"{self._site}.{self._labels[value]}") for value in self._read if value.uses()]

    @property
    def imports(self) -> Mapping[str, int]:
        """Versions of the domains, beside the standard one, that the nodes recorded so far are of."""
        return self._imports

    def _forget(self, y: ir.Value) -> None:
        """Take back a node that nothing reads, and those that only it read."""
        node = y.producer()
        if node is None or node not in self._nodes or y.uses():
            return
        self._nodes.remove(node)
        inputs = [value for value in node.inputs if value is not None]
        for place in range(len(node.inputs)):
            node.replace_input_with(place, None)
        for value in inputs:
            self._forget(value)

    def _dims_of(self, value: ir.Value) -> Dims | None:
        return self._dims[value] if value in self._dims else self._shapes.of(value)

    def _ints(self, label: str, numbers: Sequence[int]) -> ir.Value:
        return self._cached(("ints", *numbers), label, torch.tensor(list(numbers), dtype=torch.int64))

    def _cached(
        self, key: tuple[object, ...], label: str, tensor: Tensor, properties: Mapping[str, str] | None = None
    ) -> ir.Value:
        if key not in self._rearranged:
            self._rearranged[key] = self.constant(label, tensor, properties)
        return self._rearranged[key]

    def _rearranged_integers(self, key: tuple[object, ...], x: ir.Value, values: Tensor) -> ir.Value:
        if key not in self._rearranged:
            self._rearranged[key] = self._integer_constant(self._labels[x], values, dict(x.metadata_props))
        return self._rearranged[key]

    def _integer_constant(self, label: str, values: Tensor, properties: Mapping[str, str]) -> ir.Value:
        held = ir.tensor(values.to(torch.int8).contiguous().numpy(), ir.DataType.INT4)
        value = ir.Value(shape=ir.Shape(list(values.shape)), type=ir.TensorType(held.dtype), const_value=held)
        value.metadata_props.update(properties)
        self._integers[value] = values
        self._labels[value], self._dims[value] = label, tuple(values.shape)
        return value

    def _emit(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        known: Dims | None,
        **attributes: float | list[int],
    ) -> ir.Value:
        """A node; of another domain than the standard one if the operator is `domain::operator`."""
        return self._emit_all(operator, inputs, (known,), **attributes)[0]

    def _emit_all(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        known: Sequence[Dims | None],
        **attributes: float | list[int],
    ) -> Sequence[ir.Value]:
        """`_emit` of a node with as many outputs as sizes are given."""
        *domains, kind = operator.split("::")
        self._read.update(
            (value, None)
            for value in inputs
            if value is not None
            and any(value in held for held in (self._contents, self._fixed, self._integers))
        )
        domain = "".join(domains)
        if domain:
            self._imports[domain] = 1
        wanted = f"{self._site}/{kind.lower()}"
        node = ir.node(
            kind,
            inputs,
            domain=domain,
            attributes=attributes,
            name=self._names.node(wanted),
            num_outputs=len(known),
        )
        for output, dims in zip(node.outputs, known, strict=True):
            output.name = self._names.value(wanted)
            self._dims[output] = dims
        self._nodes.append(node)
        return node.outputs
