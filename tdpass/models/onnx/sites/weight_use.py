"""One use of a weight by a node, and what surrounds the plain layer there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import InvalidModelError
from tdpass.kinds import KINDS, Contraction, Window
from tdpass.models.onnx.graph.folding import as_numbers, folded_weight, numbers_of, stored_type
from tdpass.models.onnx.graph.stored_integers import Integers, numbered, with_scales
from tdpass.models.onnx.graph.tensors import held, sizes, to_torch
from tdpass.ops import AxisOps, V


@dataclass(frozen=True)
class Slot:
    """An input of a node."""

    node: ir.Node
    index: int

    @property
    def value(self) -> ir.Value:
        """The value there; slots are made only for inputs that are present."""
        value = self.node.inputs[self.index]
        if value is None:
            raise InvalidModelError(
                f"input {self.index} of node {self.node.name!r} is absent; keep the graph that was opened "
                "unchanged"
            )
        return value

    def on(self, twins: Mapping[ir.Node, ir.Node]) -> Slot:
        """The same slot in a copy of the graph."""
        return Slot(twins[self.node], self.index)


class Beside(Protocol):
    """What an operator computes before its layer, or after it."""

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        """What it reads beside the layer's input or output."""

    def on(self, twins: Mapping[ir.Node, ir.Node]) -> Beside:
        """The same in a copy of the graph."""

    def written(self, ops: Any, y: ir.Value) -> ir.Value:
        """It as nodes of its own, recorded by an `OnnxOps`."""

    def computed(self, y: Tensor, values: Mapping[ir.Value, Tensor]) -> Tensor:
        """It in torch, `values` being those that it reads."""


@dataclass(frozen=True)
class Steps:
    """The scales and zero points that an operator reads for integers, along an axis where there are several."""

    scale: Slot
    zero: Slot | None = None
    axis: int = 0

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        """The values that they are."""
        return (self.scale.value, *(() if self.zero is None else (self.zero.value,)))

    def on(self, twins: Mapping[ir.Node, ir.Node]) -> Self:
        """The same in a copy of the graph."""
        return replace(
            self, scale=self.scale.on(twins), zero=None if self.zero is None else self.zero.on(twins)
        )


@dataclass(frozen=True)
class WeightUse:
    """One node that applies a constant weight.

    The node computes `y = following(unswap(layer(swap(preceding(x)))) + addend)`, where `layer` is the plain
    linear or convolution layer with weight `scale * (stored or its transpose)` and bias `bias_scale * bias`,
    `integers` says how the operator reads a weight of integers, `bias_steps` the scales of such a bias; `swap_in`
    and `swap_out` are permutations or None.  `absorbed` is the Add node that holds the bias of a MatMul; it
    goes when the layer is replaced.  One that `reads_rows` looks up in the weight, as in a table, the rows
    that `x` numbers, and has no bias.  Of a `contraction` over several axes, or into several, these are one
    in the layer.
    """

    input: Slot
    weight: Slot
    kind: str
    transposed: bool = False
    scale: float = 1.0
    window: Window = field(default_factory=Window)
    swap_in: tuple[int, ...] | None = None
    swap_out: tuple[int, ...] | None = None
    bias: Slot | None = None
    bias_scale: float = 1.0
    addend: Slot | None = None
    addend_scale: float = 1.0
    absorbed: ir.Node | None = None
    preceding: Beside | None = None
    following: Beside | None = None
    integers: Steps | None = None
    bias_steps: tuple[Slot, ...] = ()
    reads_rows: bool = False
    contraction: Contraction | None = None

    @property
    def node(self) -> ir.Node:
        """The node that holds the weight."""
        return self.weight.node

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes that a replacement takes the place of."""
        return (self.node,) if self.absorbed is None else (self.node, self.absorbed)

    @property
    def output(self) -> ir.Value:
        """The layer's output, bias included."""
        return self.nodes[-1].outputs[0]

    @property
    def layer_geometry(self) -> tuple[object, ...]:
        """What must be equal between uses for one set of factors to serve them all."""
        axes = None if self.contraction is None else (self.contraction.made, self.contraction.summed)
        steps = () if self.integers is None else tuple(map(id, self.integers.reads))
        return self.kind, self.transposed, self.scale, self.window, axes, steps

    @property
    def bias_identity(self) -> tuple[object, ...]:
        """Equal for uses that share their bias."""
        return (None,) if self.bias is None else (id(self.bias.value), self.bias_scale)

    def turned(self, weight: Tensor) -> Tensor:
        """The weight `[o, i, *kernel]` of one as the model stores it, and the other way round."""
        if self.contraction is not None:
            shape = self.stored_shape()
            alike = weight.dim() == len(shape)
            return self.contraction.matrix(weight) if alike else self.contraction.stored(weight, shape)
        return weight.T if self.transposed else KINDS.get(self.kind).turned(weight, self.window.groups)

    def canonical(self, stored: Tensor) -> Tensor:
        """The weight as `[o, i, *kernel]`; a view of `stored` where nothing has to be computed."""
        weight = self.turned(stored)
        return weight if self.scale == 1.0 else (weight.double() * self.scale).to(weight.dtype)

    def bias_tensor(self) -> Tensor | None:
        """The bias as `[o]`, its scale included."""
        tensor = None if self.bias is None else numbers_of(self.bias.value)
        if tensor is None:
            return None
        bias = to_torch(tensor).reshape(-1).clone()
        for slot in self.bias_steps:
            bias = bias * to_torch(held(slot.value)).reshape(-1)
        return bias if self.bias_scale == 1.0 else (bias.double() * self.bias_scale).to(bias.dtype)

    def found_integers(self) -> Integers | None:
        """The integers that the weight is made of, by nodes before the operator or by itself; None for numbers."""
        value, steps = self.weight.value, self.integers
        if steps is None:
            return numbered(value)
        return with_scales([value, *steps.reads, None][:3], steps.axis)

    def stored(self) -> ir.TensorProtocol:
        """The numbers of the weight as the model lays it out."""
        integers = None if self.integers is None else self.found_integers()
        return folded_weight(self.weight.value) if integers is None else as_numbers(integers)

    def stored_type(self) -> ir.DataType:
        """The floating-point type of what the model stores, or makes of integers."""
        return stored_type(self.weight.value) if self.integers is None else ir.DataType.FLOAT

    def stored_shape(self) -> tuple[int, ...]:
        """Sizes of the weight as the model stores it."""
        return sizes(self.stored())

    def canonical_shape(self) -> tuple[int, ...]:
        """Sizes of the weight as `[o, i, *kernel]`."""
        return tuple(self.turned(torch.empty(self.stored_shape(), device="meta")).shape)

    def without_bias(self) -> WeightUse:
        """The same use with its Add left in place; only for a bias that is in an Add."""
        return replace(self, bias=None, bias_scale=1.0, absorbed=None)

    def on(self, twins: Mapping[ir.Node, ir.Node]) -> WeightUse:
        """The same use in a copy of the graph."""
        bias, addend, absorbed = self.bias, self.addend, self.absorbed
        return replace(
            self,
            input=self.input.on(twins),
            weight=self.weight.on(twins),
            bias=None if bias is None else bias.on(twins),
            addend=None if addend is None else addend.on(twins),
            absorbed=None if absorbed is None else twins[absorbed],
            preceding=None if self.preceding is None else self.preceding.on(twins),
            following=None if self.following is None else self.following.on(twins),
            integers=None if self.integers is None else self.integers.on(twins),
            bias_steps=tuple(slot.on(twins) for slot in self.bias_steps),
        )

    def _axes(self) -> tuple[Sequence[int], Sequence[int]]:
        """Sizes of the axes that the layer makes, and of those that it sums over, each along the last."""
        if self.contraction is None:
            return (0,), (0,)
        shape = self.stored_shape()
        return [shape[axis] for axis in self.contraction.made], [
            shape[axis] for axis in self.contraction.summed
        ]

    def apply(self, ops: AxisOps[V], x: V, layer: Callable[[V], V], addend: V | None) -> V:
        """The node's output, before what follows, when `layer` stands for the plain layer with its bias.

        `addend` comes already scaled.
        """
        x = x if self.swap_in is None else ops.permute(x, self.swap_in)
        made, summed = self._axes()
        y = layer(x if len(summed) == 1 else ops.join(x, len(summed)))
        if len(made) > 1:
            y = ops.split(y, made)
        if self.swap_out is not None:
            y = ops.permute(y, self.swap_out)
        return y if addend is None else ops.add(y, addend)
