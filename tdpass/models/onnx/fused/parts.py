"""Parts of a graph that one operator of com.tdpass can compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.fusing.choose import LANES
from tdpass.kernels.stage import Lanes
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import constant, from_torch, sizes, to_torch, torch_dtype
from tdpass.models.onnx.operators.fused import Operator, bounds
from tdpass.models.onnx.sites.parameters import HOLDS


class Constants:
    """Constants laid out anew for operators, each once for all its readers."""

    def __init__(self) -> None:
        self._made: dict[tuple[ir.Value, str], ir.Value] = {}

    def __call__(self, source: ir.Value, how: str, make: Callable[[], Tensor]) -> ir.Value:
        """What `make` makes of a constant, which `how` names."""
        if (source, how) not in self._made:
            tensor = from_torch(make().contiguous())
            value = ir.Value(
                shape=ir.Shape(sizes(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            value.metadata_props.update(source.metadata_props)
            self._made[source, how] = value
        return self._made[source, how]

    def like(self, source: ir.Value, how: str, wanted: Tensor) -> ir.Value:
        """The constant itself where it holds just these numbers, else a new one."""
        stored = constant(source)
        same = stored is not None and (sizes(stored), torch_dtype(stored.dtype)) == (
            tuple(wanted.shape),
            wanted.dtype,
        )
        if stored is not None and same and torch.equal(to_torch(stored), wanted):
            return source
        made = self(source, how, lambda: wanted)
        if stored is not None and stored.size != wanted.numel():
            made.metadata_props.setdefault(HOLDS, str(stored.size if sizes(stored) else 0))
        return made

    def zeros(self, source: ir.Value, *sizes: int) -> ir.Value:
        """A bias of zeros for a layer whose weight that is."""
        return self._no_parameter(source, "bias", torch.zeros(sizes))

    def bounds(self, source: ir.Value, activation: str) -> list[ir.Value]:
        """The ends of a clamp behind a layer whose weight that is; none for other activations."""
        return [
            self._no_parameter(source, f"{name} {end!r}", torch.tensor(end))
            for name, end in bounds(activation).items()
        ]

    def _no_parameter(self, source: ir.Value, how: str, numbers: Tensor) -> ir.Value:
        """Numbers beside a weight that are no parameters of the model."""
        value = self(source, how, lambda: numbers)
        value.metadata_props[HOLDS] = "0"
        return value

    def register(self, model: ir.Model) -> None:
        """Make them initializers, by the name of what they were made of where that is free."""
        names = FreshNames(model)
        for (source, how), value in self._made.items():
            value.name = names.value(source.name or how)
            model.graph.register_initializer(value)


@dataclass(frozen=True)
class Part:
    """Nodes that one operator can compute.

    `spec` says what they compute, apart from the numbers in it, `reads` are the values that they read but
    constants and `makes` those that others may read of them, as the operator's outputs.  `inputs` gives the
    operator's, with what had to be laid out anew, `families` the lanes that serve it.
    """

    spec: str
    label: str
    operator: Operator
    nodes: tuple[ir.Node, ...]
    reads: tuple[ir.Value, ...]
    makes: tuple[ir.Value, ...]
    inputs: Callable[[Constants], Sequence[ir.Value]]
    attributes: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    families: tuple[Lanes, ...] = LANES[:1]

    @property
    def key(self) -> str:
        """The name of the first value that it makes."""
        return str(self.makes[0].name)

    @property
    def last(self) -> ir.Node:
        """The node in whose place the operator stands."""
        return self.nodes[-1]
