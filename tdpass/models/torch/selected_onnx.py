"""All settings of an adaptive network as one ONNX model, which an input selects from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, compose, helper, numpy_helper
from torch import nn

from tdpass.files import folder_beside
from tdpass.layers.adaptive import dial_of
from tdpass.models.base import Batch
from tdpass.models.torch.fused.deployable import export_onnx
from tdpass.models.torch.ordinary import ordinary

SETTING, SETTINGS = "setting", "tdpass.settings"
_LEAST = 64  # numbers that a weight has to have to be worth a slice


def export_selected(network: nn.Module, example: Batch, dynamic_batch: bool, path: Path) -> None:
    """Write one ONNX model that runs at the width and rank whose number is its last input, `setting`.

    Numbers count up to the whole network, which any other number means too.  Weights that are slices of the
    whole network's are sliced from these where the model runs, so the file holds them once; batch-norms stay,
    as each setting has its own.  Weights in bits have those that the network runs at.  Metadata
    `tdpass.settings` names the settings in order, as JSON.  Raises as `export_onnx` does.
    """
    dial, models = dial_of(network), list[ModelProto]()
    settings = list(itertools.product(dial.adaptation.widths, dial.adaptation.ranks))
    with folder_beside(path) as folder:
        for number, (width, rank) in enumerate(settings):
            file, alone = folder / f"{number}.onnx", ordinary(network, width, rank, dial.bits or None)
            export_onnx(alone.eval(), example, dynamic_batch, file, optimize=False)
            models.append(onnx.load(file))
    whole = models[-1]
    held = {tensor.name: tensor for tensor in whole.graph.initializer}
    inputs = [value.name for value in whole.graph.input]
    branches = [_branch(model, number, held, inputs) for number, model in enumerate(models[:-1])]
    inner = _last(whole)
    for number in reversed(range(len(branches))):
        inner = _choice(number, branches[number], inner)
    setting = helper.make_tensor_value_info(SETTING, TensorProto.INT64, [])
    graph = helper.make_graph(
        list(inner.node),
        "settings",
        [*whole.graph.input, setting],
        [_named(value, name) for value, name in zip(whole.graph.output, _outputs(inner), strict=True)],
        list(whole.graph.initializer),
    )
    made = helper.make_model(graph, opset_imports=whole.opset_import, functions=list(whole.functions))
    made.ir_version = whole.ir_version
    helper.set_model_props(
        made, {SETTINGS: json.dumps([{"width": width, "rank": rank} for width, rank in settings])}
    )
    onnx.checker.check_model(made)
    onnx.save(made, path)


def _branch(
    model: ModelProto, number: int, held: Mapping[str, TensorProto], inputs: Sequence[str]
) -> GraphProto:
    """A network without inputs of its own, all else in it under names of its own."""
    own = [(value.name, name) for value, name in zip(model.graph.input, inputs, strict=True)]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    prefix = f"setting{number}_"
    made = compose.add_prefix(model, prefix, rename_inputs=True).graph
    renamed = {prefix + ours: theirs for ours, theirs in own}
    for node in made.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    del made.input[:]
    del made.initializer[:]
    nodes = list(made.node)
    del made.node[:]
    for name, tensor in weights.items():
        sliced = list(_slice(tensor, held.get(name), prefix + name))
        made.node.extend(sliced)
        if not sliced:
            kept = made.initializer.add()
            kept.CopyFrom(tensor)
            kept.name = prefix + name
    made.node.extend(nodes)
    return made


def _last(whole: ModelProto) -> GraphProto:
    """The last network, whose weights lie outside."""
    graph = GraphProto()
    graph.CopyFrom(whole.graph)
    del graph.input[:]
    del graph.initializer[:]
    return graph


def _choice(number: int, chosen: GraphProto, other: GraphProto) -> GraphProto:
    """The first graph where the setting has that number, else the second."""
    asked, same = f"number{number}", f"is{number}"
    value = numpy_helper.from_array(np.array(number, dtype=np.int64), asked)
    outputs = [f"answer{number}_{place}" for place in range(len(other.output))]
    nodes = [
        helper.make_node("Constant", [], [asked], value=value),
        helper.make_node("Equal", [SETTING, asked], [same]),
        helper.make_node("If", [same], outputs, then_branch=chosen, else_branch=other),
    ]
    answers = [_named(value, name) for value, name in zip(other.output, outputs, strict=True)]
    return helper.make_graph(nodes, f"choice{number}", [], answers)


def _outputs(graph: GraphProto) -> list[str]:
    return [value.name for value in graph.output]


def _named(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    made = onnx.ValueInfoProto()
    made.CopyFrom(value)
    made.name = name
    return made


def _slice(tensor: TensorProto, whole: TensorProto | None, name: str) -> Iterator[NodeProto]:
    """The nodes that slice a tensor from another one; none where it is no slice of it."""
    if whole is None or len(whole.dims) != len(tensor.dims) or int(np.prod(tensor.dims)) < _LEAST:
        return
    part, full = numpy_helper.to_array(tensor), numpy_helper.to_array(whole)
    first = _place(part, full)
    if part.dtype != full.dtype or first is None:
        return
    ends = [start + size for start, size in zip(first, part.shape, strict=True)]
    axes = list(range(part.ndim))
    for noun, values in (("starts", first), ("ends", ends), ("axes", axes)):
        constant = numpy_helper.from_array(np.array(values, dtype=np.int64), f"{name}_{noun}")
        yield helper.make_node("Constant", [], [f"{name}_{noun}"], value=constant)
    bounds = [f"{name}_{noun}" for noun in ("starts", "ends", "axes")]
    yield helper.make_node("Slice", [whole.name, *bounds], [name])


def _place(part: NDArray[np.generic], full: NDArray[np.generic]) -> list[int] | None:
    """Where a part lies in the whole: in the middle of an axis, or at its beginning."""
    if any(size > most for size, most in zip(part.shape, full.shape, strict=True)):
        return None
    firsts = [sorted({0, (most - size) // 2}) for size, most in zip(part.shape, full.shape, strict=True)]
    for first in itertools.product(*firsts):
        window = tuple(slice(start, start + size) for start, size in zip(first, part.shape, strict=True))
        if np.array_equal(full[window], part):
            return list(first)
    return None
