"""Nodes made one after another for a place in a graph, spelled as the model's opset wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import sizes

_AXES_AS_INPUT = 13
_OUTPUTS_COUNTED = 18
_LIMITS_AS_INPUT = 11


class Emitter:
    """Makes nodes with names like `label`; what they hold becomes initializers of the main graph."""

    def __init__(self, graph: ir.Graph, names: FreshNames, label: str, opset: int) -> None:
        self._graph, self._names, self._label, self._opset = graph, names, label, opset
        self._nodes: list[ir.Node] = []
        self._ints: dict[tuple[int, ...] | int, ir.Value] = {}

    def __call__(self, operator: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """The output of a new node."""
        return self.several(operator, inputs, 1, **attributes)[0]

    def several(
        self, operator: str, inputs: Sequence[ir.Value], count: int, **attributes: object
    ) -> Sequence[ir.Value]:
        """The outputs of a new node."""
        wanted = f"{self._label}/{operator.lower()}"
        node = ir.node(
            operator,
            list(inputs),
            attributes=attributes,  # type: ignore[arg-type]
            num_outputs=count,
            name=self._names.node(wanted),
        )
        for output in node.outputs:
            output.name = self._names.value(wanted)
        self._nodes.append(node)
        return node.outputs

    def put(self, node: ir.Node) -> Sequence[ir.Value]:
        """The outputs of a node that was made elsewhere."""
        for output in node.outputs:
            output.name = self._names.value(f"{self._label}/{node.op_type.lower()}")
        self._nodes.append(node)
        return node.outputs

    def free(self, wanted: str) -> str:
        """A name like that which no value has."""
        return self._names.value(wanted)

    def take(self) -> list[ir.Node]:
        """The nodes made since the last call."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def within(self) -> Emitter:
        """One for the body of a node."""
        return Emitter(self._graph, self._names, self._label, self._opset)

    def value(self, wanted: str, shape: Sequence[int | None], dtype: ir.DataType) -> ir.Value:
        """A value that no node makes, such as the input of a body."""
        name = self._names.value(f"{self._label}/{wanted}")
        return ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))

    def held(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """An initializer of exactly that name, which must be free."""
        shape = ir.Shape(sizes(tensor))
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def lazy(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], ir.TensorProtocol]
    ) -> ir.Value:
        """An initializer that is made whenever it is read."""
        return self.held(ir.LazyTensor(make, dtype, ir.Shape(list(shape)), name=name), name)

    def ints(self, numbers: tuple[int, ...] | int) -> ir.Value:
        """Whole numbers, or one without an axis."""
        if numbers not in self._ints:
            shown = numbers if isinstance(numbers, int) else list(numbers)
            name = self._names.value(f"{self._label}/numbers")
            self._ints[numbers] = self.held(ir.tensor(shown, ir.DataType.INT64, name=name), name)
        return self._ints[numbers]

    def unsqueezed(self, x: ir.Value, axis: int) -> ir.Value:
        """X with an axis of one."""
        if self._opset < _AXES_AS_INPUT:
            return self("Unsqueeze", x, axes=[axis])
        return self("Unsqueeze", x, self.ints((axis,)))

    def together(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        """The parts along a new axis."""
        apart = [self.unsqueezed(part, axis) for part in parts]
        return apart[0] if len(apart) == 1 else self("Concat", *apart, axis=axis)

    def split(self, x: ir.Value, count: int) -> Sequence[ir.Value]:
        """X in equal parts along its last axis."""
        counted = {"num_outputs": count} if self._opset >= _OUTPUTS_COUNTED else {}
        return self.several("Split", [x], count, axis=-1, **counted)

    def clipped(self, x: ir.Value, limit: float) -> ir.Value:
        """X between -limit and limit."""
        if self._opset < _LIMITS_AS_INPUT:
            return self("Clip", x, min=-limit, max=limit)
        kind = x.dtype or ir.DataType.FLOAT
        low, high = (
            self.held(ir.tensor(sign * limit, kind), self._names.value(f"{self._label}/limit"))
            for sign in (-1, 1)
        )
        return self("Clip", x, low, high)

    def body(
        self, nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
    ) -> ir.Graph:
        """A body; its nodes may read whatever is outside."""
        return ir.Graph(list(inputs), list(outputs), nodes=list(nodes), name=f"{self._label}/body")
