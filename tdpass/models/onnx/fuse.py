"""Deciding which chains of an ONNX model become fused operators.

Measured one by one, then on the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.fusing.choose import LANES, PLAIN, Calls, Trial, measured, seconds_of
from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import ChainCall
from tdpass.kernels.native import onnx_ops_path
from tdpass.kernels.stage import Lanes, Stage
from tdpass.models.onnx.chains import Axes, NodeChain, NodeReader, axes_of, label, result
from tdpass.models.onnx.fused_ops import REGISTER, FusedOp
from tdpass.models.onnx.fused_rewrite import (
    Fusion,
    Fusions,
    add_function,
    fused,
    fused_node,
    plain_initializers,
)
from tdpass.models.onnx.graphs import opset_of
from tdpass.models.onnx.session import Session
from tdpass.models.onnx.tensors import from_torch

MARGIN = 0.02  # by how much times must differ to be told apart
_HOPEFUL = (
    0.9  # a chain that loses a little alone can win beside others: between two of them no layout changes
)
_THRESHOLDS = (_HOPEFUL, 1 + MARGIN, 1.2, 1.6)
_ROUNDS = 15


@dataclass(frozen=True)
class _Candidate:
    """A chain and how much faster it is alone as one operator, with the better lanes."""

    chain: NodeChain
    lanes: Lanes
    gain: float

    @property
    def fusion(self) -> Fusion:
        return Fusion(self.chain.spec, self.lanes)


def decide(
    build: Callable[[], ir.Model],
    inputs: Mapping[str, Tensor],
    note: Callable[[str], None],
    decline: Callable[[str, str], None],
) -> Fusions:
    """The chains that make the model faster on one thread when they are one operator each, by the name of what they compute.

    `build` makes the model anew, which may then be changed; `inputs` are what to time it on, and may be
    missing.  A chain is timed alone with either kind of lanes, and then the model with those that gained:
    ONNX Runtime keeps its own convolutions in a layout of its own, which it has to change before and after an
    operator that is not its own.
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
                label(candidate.chain),
                f"as one operator it takes {1 / candidate.gain:.2f} times as long alone, and the model is "
                "no faster for it",
            )
    if chosen:
        gains = sorted(candidates[name].gain for name in chosen)
        note(
            f"{len(chosen)} chains became one operator each, {gains[0]:.2f} to {gains[-1]:.2f} times as "
            f"fast alone; they, and all times here, need {REGISTER}"
        )
    return {name: candidates[name].fusion for name in candidates if name in chosen}


def _candidates(
    model: ir.Model, inputs: Mapping[str, Tensor], decline: Callable[[str, str], None]
) -> dict[str, _Candidate]:
    """The chains that are not clearly slower as one operator, by the name of what they compute."""
    plain_initializers(model)
    known = axes_of(model, {name: tuple(tensor.shape) for name, tensor in inputs.items()})
    found: dict[str, _Candidate] = {}
    for chain in find_chains(NodeReader(model)):
        shape = _sizes(known.get(chain.x.value.name or ""))
        if shape is None:
            decline(label(chain), "the size of its input is not known; pass data= or example_inputs=")
            continue
        verdict = measured([_in_onnx_runtime(ChainCall(chain.spec, shape), opset_of(model))], LANES, _HOPEFUL)
        if verdict.lanes is None:
            decline(label(chain), f"as one operator it takes {1 / verdict.gain:.2f} times as long")
        else:
            found[str(result(chain).name)] = _Candidate(chain, verdict.lanes, verdict.gain)
    return found


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


def _in_onnx_runtime(call: ChainCall, opset: int) -> Trial:
    """The chain on one thread of ONNX Runtime.

    As an operator of this package, against the standard operators that it stands for.
    """
    return Trial(
        call, f"onnxruntime {onnxruntime.__version__}, opset {opset}", 1, partial(_calls, call, opset)
    )


def _calls(call: ChainCall, opset: int) -> Calls:
    inputs = {"x": torch.randn(call.size)}
    if call.spec.residual:
        inputs["residual"] = torch.randn(call.output_size)
    models: dict[str, ir.Model] = {
        name: _alone(call, inputs, opset, name) for name in (LANES[:1] if call.spec.linear else LANES)
    }
    models[PLAIN] = _alone(call, inputs, opset, LANES[0])
    InlinePass()(models[PLAIN])
    return {name: Session(model, threads=1).bound(inputs) for name, model in models.items()}


def _alone(call: ChainCall, inputs: Mapping[str, Tensor], opset: int, lanes: Lanes) -> ir.Model:
    """A model of nothing but the chain, as one operator, with weights that are not its own."""
    generator = torch.Generator().manual_seed(0)
    op, spec = FusedOp.of(call.spec), call.spec
    shapes = [_weight_shape(spec.axes, stage) for stage in spec.stages]
    values = {
        name: ir.Value(name=name, shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(ir.DataType.FLOAT))
        for name, tensor in inputs.items()
    }
    graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports={"": opset}, name="chain")
    model = ir.Model(graph, ir_version=8)
    for name, size in zip(
        [name for name in op.inputs if name not in values],
        [*shapes, (spec.stages[-1].outputs,)],
        strict=False,
    ):
        tensor = from_torch(torch.randn(size, generator=generator))
        values[name] = ir.Value(
            name=name, shape=ir.Shape(size), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(values[name])
    node = fused_node(spec, [values[name] for name in op.inputs], lanes, "chain")
    graph.append(node)
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(list(call.output_size)), ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(y)
    add_function(model, spec)
    return model


def _weight_shape(axes: int, stage: Stage) -> tuple[int, ...]:
    return (*stage.shape[:2], *stage.kernel[-axes:]) if axes else (stage.inputs, stage.outputs)
