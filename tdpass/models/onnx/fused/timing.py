"""Parts of an ONNX graph cut out of it and timed: alone, and beside a neighbour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from tdpass.fusing.choose import PLAIN, Calls, Trial, kept_seconds
from tdpass.models.onnx.fused.neighbours import Neighbours
from tdpass.models.onnx.fused.parts import Part
from tdpass.models.onnx.fused.rewrite import Fusion, Fusions, fused
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.tensors import torch_dtype
from tdpass.models.onnx.operators.fused import DOMAIN, FUNCTIONS_SINCE_IR
from tdpass.models.onnx.operators.session import Session

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Called:
    """What is cut out as it is called, with the sizes of what it reads."""

    spec: str
    sizes: tuple[Sizes, ...]
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> Sizes:
        """Size of its first input."""
        return self.sizes[0]

    def __str__(self) -> str:
        return f"{self.spec} on {', '.join('x'.join(map(str, size)) for size in self.sizes)}"


def alone(model: ir.Model, part: Part, sizes: tuple[Sizes, ...]) -> Trial[Called]:
    """The part on one thread of ONNX Runtime, as one operator and as the nodes that it stands for."""
    ways: dict[str, Fusions] = {lanes: {part.key: Fusion(part.spec, lanes)} for lanes in part.families}
    return _trial(model, Called(part.spec, sizes), part.reads, part.makes, {PLAIN: {}} | ways)


def in_a_row(
    model: ir.Model, row: Neighbours, sizes: tuple[Sizes, ...], fusions: Fusions
) -> dict[frozenset[str], float] | None:
    """Seconds of two neighbours, by the keys of those that are operators; `fusions` says which may be.

    None where they are found as other parts once they are cut out of the graph.
    """
    first, second = row.first.key, row.second.key
    choices = [[key for key in keys if key in fusions] for keys in ((), (first,), (second,), (first, second))]
    ways = {
        f"in a row {' '.join(str(key in chosen) for key in (first, second))}": frozenset(chosen)
        for chosen in choices
    }
    lanes = [fusions[key].lanes for key in (first, second) if key in fusions]
    trial = _trial(
        model,
        Called(f"{row} {lanes}", sizes),
        row.reads,
        row.makes,
        {way: {key: fusions[key] for key in chosen} for way, chosen in ways.items()},
    )
    seconds = kept_seconds({way: trial.key(way) for way in ways}, trial.calls, trial.threads)
    found = {ways[way]: each for way, each in seconds.items()}
    return found if all(map(math.isfinite, found.values())) else None


def _trial(
    model: ir.Model,
    call: Called,
    reads: Sequence[ir.Value],
    makes: Sequence[ir.Value],
    ways: Mapping[str, Fusions],
) -> Trial[Called]:
    runtime = f"onnxruntime {onnxruntime.__version__}, opset {opset_of(model)}"
    inputs = list(zip(reads, call.sizes, strict=True))
    return Trial(call, runtime, 1, partial(_calls, model, inputs, makes, ways))


def _calls(
    model: ir.Model,
    reads: Iterable[tuple[ir.Value, Sizes]],
    makes: Sequence[ir.Value],
    ways: Mapping[str, Fusions],
) -> Calls:
    """A session for each way; none where the parts are not found."""
    inputs = {str(value.name): _example(value, size) for value, size in reads}
    calls = {}
    for way, fusions in ways.items():
        cut = fused(_cut(model, inputs, makes), fusions)
        if sum(node.domain == DOMAIN for node in cut.graph) == len(fusions):
            calls[way] = Session(cut, threads=1).bound(inputs)
    return calls


def _example(value: ir.Value, size: Sizes) -> Tensor:
    if value.dtype == ir.DataType.UINT8:
        return torch.randint(256, size, dtype=torch.uint8)
    return torch.randn(size, dtype=torch_dtype(value.dtype or ir.DataType.FLOAT))


def _cut(model: ir.Model, inputs: Mapping[str, Tensor], makes: Sequence[ir.Value]) -> ir.Model:
    """A model of nothing but what makes these values of those, with its weights, on inputs of these sizes."""
    graph = ir.convenience.extract(model.graph, list(inputs), list(makes))
    for value in graph.inputs:
        value.shape = ir.Shape(list(inputs[str(value.name)].shape))
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    for value in graph.outputs:
        value.shape, value.type = None, value.type or ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(graph, ir_version=max(model.ir_version or 0, FUNCTIONS_SINCE_IR))
