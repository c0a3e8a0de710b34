"""Deciding which chains of an ONNX model become fused operators: measured one by one, then on the whole model."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from tdpass.clock import interleaved
from tdpass.errors import KernelError
from tdpass.kernels.native import onnx_ops_path
from tdpass.models.onnx.chains import Axes, Chain, LayerNode, axes_of, find_chains
from tdpass.models.onnx.fused_ops import LANES, REGISTER
from tdpass.models.onnx.fused_rewrite import Fusion, Fusions, add_function, fused, fused_node, plain_initializers
from tdpass.models.onnx.rewrite import opset_of
from tdpass.models.onnx.session import Session
from tdpass.models.onnx.tensors import from_torch

Key = TypeVar("Key", bound=Hashable)
MARGIN = 0.02  # by how much times must differ to be told apart
_HOPEFUL = 0.9  # a chain that loses a little alone can win beside others: between two of them no layout changes
_THRESHOLDS = (_HOPEFUL, 1 + MARGIN, 1.2, 1.6)
_ROUNDS, _SECONDS_PER_READING = 15, 2e-3
_TIMES: dict[tuple[object, ...], dict[str, float]] = {}


@dataclass(frozen=True)
class _Candidate:
    """A chain and how much faster it is alone as one operator, with the better lanes."""

    chain: Chain
    lanes: str
    gain: float

    @property
    def fusion(self) -> Fusion:
        return Fusion(self.chain.signature, self.lanes)


def decide(build: Callable[[], ir.Model], inputs: Mapping[str, Tensor], note: Callable[[str], None], decline: Callable[[str, str], None]) -> Fusions:
    """The chains that make the model faster on one thread when they are one operator each, by the name of what they compute.

    `build` makes the model anew, which may then be changed; `inputs` are what to time it on, and may be missing.  A chain is
    timed alone with either kind of lanes, and then the model with those that gained: ONNX Runtime keeps its own convolutions in
    a layout of its own, which it has to change before and after an operator that is not its own.
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
            decline(candidate.chain.label, f"as one operator it takes {1 / candidate.gain:.2f} times as long alone, and the model is no faster for it")
    if chosen:
        gains = sorted(candidates[name].gain for name in chosen)
        note(f"{len(chosen)} chains became one operator each, {gains[0]:.2f} to {gains[-1]:.2f} times as fast alone; they, and all times here, need {REGISTER}")
    return {name: candidates[name].fusion for name in candidates if name in chosen}


def _candidates(model: ir.Model, inputs: Mapping[str, Tensor], decline: Callable[[str, str], None]) -> dict[str, _Candidate]:
    """The chains that are not clearly slower as one operator, by the name of what they compute."""
    plain_initializers(model)
    known = axes_of(model, {name: tuple(tensor.shape) for name, tensor in inputs.items()})
    found: dict[str, _Candidate] = {}
    for chain in find_chains(model):
        shape = _sizes(known.get(chain.x.name or ""))
        if shape is None:
            decline(chain.label, "the size of its input is not known; pass data= or example_inputs=")
            continue
        times = dict(_times(chain, shape, opset_of(model)))
        plain = times.pop("plain")
        lanes = min(times, key=lambda name: times[name])
        if plain / times[lanes] < _HOPEFUL:
            decline(chain.label, f"as one operator it takes {times[lanes] / plain:.2f} times as long")
        else:
            found[str(chain.y.name)] = _Candidate(chain, lanes, plain / times[lanes])
    return found


def _sizes(axes: Axes | None) -> tuple[int, ...] | None:
    """Sizes with one sample where the first axis is open; None where another one is."""
    if not axes:
        return None
    first, *rest = axes
    known = [size for size in (first if isinstance(first, int) else 1, *rest) if isinstance(size, int)]
    return tuple(known) if len(known) == len(axes) and 0 not in known else None


def _best_together(build: Callable[[], ir.Model], candidates: Mapping[str, _Candidate], inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Of the chains that gain more than one threshold or another, those that make the model fastest; none where it gets no faster."""
    nothing: frozenset[str] = frozenset()
    choices = dict.fromkeys([nothing, *(frozenset(name for name, c in candidates.items() if c.gain >= least) for least in _THRESHOLDS)])
    if len(choices) == 1:
        return nothing
    calls = {choice: Session(fused(build(), {name: candidates[name].fusion for name in choice}), threads=1).bound(inputs) for choice in choices}
    times = _interleaved(calls)
    best = min(times, key=lambda choice: times[choice])
    return best if times[best] < times[nothing] * (1 - MARGIN) else nothing


def _times(chain: Chain, shape: tuple[int, ...], opset: int) -> dict[str, float]:
    """Seconds of CPU time of the chain alone on an input of that shape: as it is ("plain"), and as one operator with either kind of lanes."""
    key = (opset, shape, chain.signature)
    if key not in _TIMES:
        inputs = {"x": torch.randn(shape)}
        if chain.residual is not None:
            inputs["residual"] = torch.randn(_output_shape(chain, shape))
        lanes = LANES if chain.layers[0].axes else LANES[:1]
        models = {name: _alone(chain, inputs, opset, name) for name in lanes}
        models["plain"] = _alone(chain, inputs, opset, LANES[0])
        InlinePass()(models["plain"])
        _TIMES[key] = _interleaved({name: Session(model, threads=1).bound(inputs) for name, model in models.items()})
    return _TIMES[key]


def _alone(chain: Chain, inputs: Mapping[str, Tensor], opset: int, lanes: str) -> ir.Model:
    """A model of nothing but the chain, as one operator, with weights that are not its own."""
    generator = torch.Generator().manual_seed(0)
    op, last = chain.op, chain.layers[-1].stage
    weights = [_weight_shape(layer) for layer in chain.layers]
    values = {name: ir.Value(name=name, shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(ir.DataType.FLOAT)) for name, tensor in inputs.items()}
    graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports={"": opset}, name="chain")
    model = ir.Model(graph, ir_version=8)
    for name, size in zip([name for name in op.inputs if name not in values], [*weights, (last.outputs,)], strict=False):
        tensor = from_torch(torch.randn(size, generator=generator))
        values[name] = ir.Value(name=name, shape=ir.Shape(size), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(values[name])
    node = fused_node(op, chain.layers, [values[name] for name in op.inputs], lanes, "chain")
    graph.append(node)
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(_output_shape(chain, tuple(inputs["x"].shape))), ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(y)
    add_function(model, op)
    return model


def _weight_shape(layer: LayerNode) -> tuple[int, ...]:
    stage = layer.stage
    return (*stage.shape[:2], *stage.kernel[-layer.axes :]) if layer.axes else (stage.inputs, stage.outputs)


def _output_shape(chain: Chain, shape: tuple[int, ...]) -> list[int]:
    """Shape of what the chain makes of an input of that shape."""
    axes = chain.layers[0].axes
    if not axes:
        return [*shape[:-1], chain.layers[-1].stage.outputs]
    size: tuple[int | torch.SymInt, ...] = (1, *shape[2:])[-2:]
    for layer in chain.layers:
        size = layer.stage.output_size(size)
    return [shape[0], chain.layers[-1].stage.outputs, *(int(length) for length in size[-axes:])]


def _interleaved(calls: Mapping[Key, Callable[[], object]]) -> dict[Key, float]:
    """Median seconds of this thread's CPU time per call, all taking turns: sessions of one thread compute on the caller's."""
    rows = interleaved(list(calls.values()), _ROUNDS, clock=time.thread_time, least=_SECONDS_PER_READING, warm_up=0.0)
    return {key: median(row) for key, row in zip(calls, rows, strict=True)}
