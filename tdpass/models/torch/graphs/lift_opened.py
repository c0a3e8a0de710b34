"""Embedding bags and bilinear layers in an fx graph as their modules, so that the pass `divide` opens them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from tdpass.models.torch.graphs.lift_recurrent import called, owner_of, put

_aten = torch.ops.aten
_BAGS = {_aten.embedding_bag.default, _aten.embedding_bag.padding_idx}
_BILINEAR = {_aten.bilinear.default, nn.functional.bilinear}
_MODES = ("sum", "mean", "max")


def lift_opened(graph_module: GraphModule) -> bool:
    """Let modules of torch.nn run what the graph runs by functions of stored weights, in place.

    Returns whether any does. Each stands where its weights were, which nothing else may read. The outputs do
    not change.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _BAGS:
            changed = _bag(graph_module, node) or changed
        elif node.op == "call_function" and node.target in _BILINEAR:
            changed = _bilinear(graph_module, node) or changed
    if changed:
        graph_module.graph.eliminate_dead_code()
    return changed


def _bag(graph_module: GraphModule, node: Node) -> bool:
    given: Any = (*node.args, *(None,) * (9 - len(node.args)))
    table, numbers, offsets, scaled, mode, sparse, weighed, with_last, padding = given
    path = owner_of(graph_module, node, [table])
    others = [user for user in node.users if user.args[1] != 0 and user.users]
    if path is None or others:
        return False
    weight = operator.attrgetter(str(table.target))(graph_module)
    count, width = weight.shape
    module = nn.EmbeddingBag(
        count, width, scale_grad_by_freq=bool(scaled), mode=_MODES[mode or 0], sparse=bool(sparse),
        include_last_offset=bool(with_last), padding_idx=padding, device="meta",
    )  # fmt: skip
    put(graph_module, path, module, ["weight"], [weight])
    read = (numbers, offsets) if weighed is None else (numbers, offsets, weighed)
    call = called(graph_module, node, path, read)
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(call)
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(node)
    return True


def _bilinear(graph_module: GraphModule, node: Node) -> bool:
    given: Any = (*node.args, *(None,) * (4 - len(node.args)))
    one, other, *reads = given
    reads = [read for read in reads if read is not None]
    path = None if node.kwargs else owner_of(graph_module, node, reads)
    if path is None:
        return False
    held: list[Any] = [operator.attrgetter(str(read.target))(graph_module) for read in reads]
    outputs, first, second = held[0].shape
    module = nn.Bilinear(first, second, outputs, bias=len(held) > 1, device="meta")
    put(graph_module, path, module, ["weight", "bias"][: len(held)], held)
    call = called(graph_module, node, path, (one, other))
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)
    return True
