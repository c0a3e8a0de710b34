"""Deciding which parts of an ONNX model become fused operators.

Measured one by one, then on the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.fusing.choose import PLAIN, Calls, Trial, measured, seconds_of
from tdpass.kernels.native import onnx_ops_path
from tdpass.kernels.stage import Lanes
from tdpass.models.onnx.fused.links import Axes, axes_of
from tdpass.models.onnx.fused.parts import Part
from tdpass.models.onnx.fused.rewrite import Fusion, Fusions, find_parts, fused, plain_initializers
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.tensors import torch_dtype
from tdpass.models.onnx.operators.fused import FUNCTIONS_SINCE_IR, REGISTER
from tdpass.models.onnx.operators.session import Session
from tdpass.models.onnx.rewriting.integer_activations import watched

MARGIN = 0.02  # by how much times must differ to be told apart
_HOPEFUL = (
    0.9  # a chain that loses a little alone can win beside others: between two of them no layout changes
)
_THRESHOLDS = (_HOPEFUL, 1 + MARGIN, 1.2, 1.6)
_ROUNDS = 15


@dataclass(frozen=True)
class _Candidate:
    """A part and how much faster it is alone as one operator, with the better lanes."""

    part: Part
    lanes: Lanes
    gain: float

    @property
    def fusion(self) -> Fusion:
        return Fusion(self.part.spec, self.lanes, self.part.operator.grain)


@dataclass(frozen=True)
class _Call:
    """A part as it is called, with the sizes of what it reads."""

    spec: str
    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> tuple[int, ...]:
        return self.sizes[0]

    def __str__(self) -> str:
        return f"{self.spec} on {', '.join('x'.join(map(str, size)) for size in self.sizes)}"


def decide(
    build: Callable[[], ir.Model],
    inputs: Mapping[str, Tensor],
    note: Callable[[str], None],
    decline: Callable[[str, str], None],
) -> Fusions:
    """The parts that make the model faster as one operator each, by the name of what they compute.

    The time is on one thread. `build` makes the model anew, which may then be changed; `inputs` are what to
    time it on, and may be missing.  A part is timed alone with either kind of lanes, and then the model with
    those that gained: ONNX Runtime keeps its own convolutions in a layout of its own, which it has to change
    before and after an operator that is not its own.
    """
    try:
        onnx_ops_path()
    except KernelError as error:
        note(str(error))
        return {}
    candidates = _candidates(build(), inputs, decline)
    clear = frozenset(name for name, candidate in candidates.items() if candidate.gain > 1 + MARGIN)
    chosen = _best_together(build, candidates, inputs) if inputs else clear
    for name, candidate in candidates.items():
        if name not in chosen:
            decline(
                candidate.part.label,
                f"as one operator it takes {1 / candidate.gain:.2f} times as long alone, and the model is "
                "no faster for it",
            )
    if chosen:
        gains = sorted(candidates[name].gain for name in chosen)
        made = f"{len(chosen)} chains became one operator each, {gains[0]:.2f} to {gains[-1]:.2f} times"
        if len(chosen) == 1:
            made = f"1 chain became one operator, {gains[0]:.2f} times"
        note(f"{made} as fast alone; the model, and all times here, need {REGISTER}")
    rounding = [name for name in chosen if candidates[name].part.operator.grain]
    if rounding:
        note(f"{len(rounding)} of {len(chosen)} operators round what they read, as their layers' weights are")
    return {name: candidates[name].fusion for name in candidates if name in chosen}


def _candidates(
    model: ir.Model, inputs: Mapping[str, Tensor], decline: Callable[[str, str], None]
) -> dict[str, _Candidate]:
    """The parts that are not clearly slower as one operator, by the name of what they compute."""
    plain_initializers(model)
    parts = find_parts(model)
    known = _known_sizes(model, parts, inputs)
    found: dict[str, _Candidate] = {}
    for part in parts:
        sizes = [_sizes(known.get(value.name or "")) for value in part.reads]
        shapes = tuple(shape for shape in sizes if shape is not None)
        if len(shapes) < len(sizes):
            decline(part.label, "the size of its input is not known; pass data= or example_inputs=")
            continue
        trial = _in_onnx_runtime(model, part, shapes)
        verdict = measured([trial], part.families, _HOPEFUL)
        if verdict.lanes is None:
            decline(part.label, f"as one operator it takes {1 / verdict.gain:.2f} times as long")
        else:
            found[part.key] = _Candidate(part, verdict.lanes, verdict.gain)
    return found


def _known_sizes(model: ir.Model, parts: Sequence[Part], inputs: Mapping[str, Tensor]) -> dict[str, Axes]:
    """Sizes of what parts read, by name.

    They are as they follow from those of the inputs, else as a run on these has them.
    """
    known = axes_of(model, {name: tuple(tensor.shape) for name, tensor in inputs.items()})
    read = dict.fromkeys(str(value.name) for part in parts for value in part.reads)
    unknown = [name for name in read if _sizes(known.get(name)) is None]
    if inputs and unknown:
        seen = watched(model, unknown)(inputs)
        known |= {name: tuple(seen[name].shape) for name in unknown}
    return known


def _sizes(axes: Axes | None) -> tuple[int, ...] | None:
    """Sizes with one sample where the first axis is open; None where another one is."""
    if not axes:
        return None
    first, *rest = axes
    known = [size for size in (first if isinstance(first, int) else 1, *rest) if isinstance(size, int)]
    return tuple(known) if len(known) == len(axes) and 0 not in known else None


def _best_together(
    build: Callable[[], ir.Model], candidates: Mapping[str, _Candidate], inputs: Mapping[str, Tensor]
) -> frozenset[str]:
    """Of the chains that gain more than one threshold or another, those that make the model fastest.

    None where it gets no faster.
    """
    nothing: frozenset[str] = frozenset()
    choices = dict.fromkeys(
        [
            nothing,
            *(frozenset(name for name, c in candidates.items() if c.gain >= least) for least in _THRESHOLDS),
        ]
    )
    if len(choices) == 1:
        return nothing
    calls = {
        choice: Session(fused(build(), {name: candidates[name].fusion for name in choice}), threads=1).bound(
            inputs
        )
        for choice in choices
    }
    times = seconds_of(calls, 1, _ROUNDS)
    best = min(times, key=lambda choice: times[choice])
    return best if times[best] < times[nothing] * (1 - MARGIN) else nothing


def _in_onnx_runtime(model: ir.Model, part: Part, sizes: tuple[tuple[int, ...], ...]) -> Trial[_Call]:
    """The part on one thread of ONNX Runtime.

    As an operator of this package, against the nodes that it stands for.
    """
    runtime = f"onnxruntime {onnxruntime.__version__}, opset {opset_of(model)}"
    return Trial(_Call(part.spec, sizes), runtime, 1, partial(_calls, model, part, sizes))


def _calls(model: ir.Model, part: Part, sizes: tuple[tuple[int, ...], ...]) -> Calls:
    inputs = {str(value.name): _example(value, size) for value, size in zip(part.reads, sizes, strict=True)}
    models: dict[str, ir.Model] = {PLAIN: _alone(model, part, inputs)}
    for lanes in part.families:
        models[lanes] = fused(_alone(model, part, inputs), {part.key: Fusion(part.spec, lanes)})
    return {name: Session(each, threads=1).bound(inputs) for name, each in models.items()}


def _example(value: ir.Value, size: tuple[int, ...]) -> Tensor:
    if value.dtype == ir.DataType.UINT8:
        return torch.randint(256, size, dtype=torch.uint8)
    return torch.randn(size, dtype=torch_dtype(value.dtype or ir.DataType.FLOAT))


def _alone(model: ir.Model, part: Part, inputs: Mapping[str, Tensor]) -> ir.Model:
    """A model of nothing but the part, with its weights, on inputs of these sizes."""
    graph = ir.convenience.extract(model.graph, list(dict.fromkeys(part.reads)), list(part.makes))
    for value in graph.inputs:
        value.shape = ir.Shape(list(inputs[str(value.name)].shape))
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    for value in graph.outputs:
        value.shape, value.type = None, value.type or ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(graph, ir_version=max(model.ir_version or 0, FUNCTIONS_SINCE_IR))
