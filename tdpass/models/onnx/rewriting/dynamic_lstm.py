"""DynamicQuantizeLSTM of ONNX Runtime: an LSTM with int8 weights that rounds what it reads in every call."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx.graph.emitting import Emitter
from tdpass.models.onnx.graph.graphs import nodes_of, opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.tensors import constant, from_torch, to_torch
from tdpass.models.onnx.rewriting.rewrite import take_place
from tdpass.models.onnx.sites.cells import P, R, W
from tdpass.models.onnx.sites.parameters import HOLDS

NAME, DOMAIN = "DynamicQuantizeLSTM", "com.microsoft"
_GRIDS = {W: (8, 9), R: (10, 11)}  # the places of scale and zero point of each weight


def plain_lstms(model: ir.Model) -> int:
    """Make an LSTM of floating-point numbers of every such node whose weights are constants, in place.

    Returns how many tensors were integers.
    """
    names, count = FreshNames(model), 0
    for node in nodes_of(model):
        if node.op_type != NAME or node.domain != DOMAIN or node.graph is None:
            continue
        weights = {place: _numbers(node, place) for place in _GRIDS}
        if any(numbers is None for numbers in weights.values()):
            continue
        emit = Emitter(model.graph, names, node.name or "lstm", opset_of(model))
        given = list(node.inputs[: P + 1])
        for place, numbers in weights.items():
            source = node.inputs[place]
            assert numbers is not None
            assert source is not None
            label = names.value(str(source.name).removesuffix("_quantized"))
            given[place] = emit.held(from_torch(numbers), label)
        made = emit.put(
            ir.Node(
                "",
                "LSTM",
                given,
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                name=names.node(node.name or "lstm"),
                metadata_props=dict(node.metadata_props),
            )
        )
        node.graph.insert_before(node, emit.take())
        for old, new in zip(node.outputs, made, strict=True):
            if old.name:
                take_place(old, new)
            else:
                new.name = ""
        node.graph.remove(node, safe=True)
        count += len(weights)
    return count


def _numbers(node: ir.Node, place: int) -> Tensor | None:
    """The weight `[directions, gates hidden, i]` of what is held as `[directions, i, gates hidden]`."""
    held = [constant(node.inputs[each]) for each in (place, *_GRIDS[place])]
    if any(tensor is None for tensor in held):
        return None
    codes, scale, zero = (to_torch(tensor) for tensor in held if tensor is not None)
    columns = (len(codes), 1, -1)
    numbers = (codes.double() - zero.double().reshape(columns)) * scale.double().reshape(columns)
    return numbers.transpose(1, 2).float().contiguous()


def dynamic_lstm(
    model: ir.Model,
    emit: Emitter,
    twin: ir.Node,
    inputs: Sequence[ir.Value | None],
    weights: Sequence[tuple[str, Tensor, Tensor]],
) -> Sequence[ir.Value]:
    """The outputs of such a node.

    `weights` are names, codes `[directions, gates hidden, i]` and scales of W, then R.
    """
    model.opset_imports.setdefault(DOMAIN, 1)
    given = [*inputs, *(None,) * (P + 1 - len(inputs))]
    grids: list[ir.Value] = []
    for place, (name, codes, scales) in zip(_GRIDS, weights, strict=True):
        given[place] = emit.held(from_torch(codes.transpose(1, 2).contiguous()), emit.free(name))
        zero = torch.zeros_like(scales, dtype=torch.int8)
        for noun, tensor in (("scale", scales.contiguous()), ("zero", zero)):
            value = emit.held(from_torch(tensor), emit.free(f"{name}_{noun}"))
            value.metadata_props[HOLDS] = "0"
            grids.append(value)
    attributes = [held for name, held in twin.attributes.items() if name != "layout"]
    return emit.put(
        ir.Node(
            DOMAIN,
            NAME,
            [*given, *grids],
            attributes,
            num_outputs=len(twin.outputs),
            name=twin.name,
            metadata_props=dict(twin.metadata_props),
        )
    )
