"""Einsums of an fx graph with a stored operand, spelled out as linear layers between changes of axes."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from tdpass.errors import UnsupportedError
from tdpass.kinds import Contraction, moves

_EINSUM = {torch.einsum, torch.ops.aten.einsum.default}


def spell_out(graph_module: GraphModule) -> bool:
    """Write every einsum of data and a parameter that nothing else reads as `F.linear`, in place.

    Returns whether any was. The parameter takes the shape `[o, i]`.  The outputs do not change.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _EINSUM:
            changed = _spelled(graph_module, node) or changed
    if changed:
        graph_module.graph.eliminate_dead_code()
    return changed


def _operands(node: Node) -> list[Any]:
    given = node.args[1:]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else list(given)


def _spelled(graph_module: GraphModule, node: Node) -> bool:
    operands, equation = _operands(node), node.args[0]
    held = [place for place, read in enumerate(operands) if isinstance(read, Node) and read.op == "get_attr"]
    if len(operands) != 2 or len(held) != 1 or not isinstance(equation, str):
        return False
    read, data = operands[held[0]], operands[1 - held[0]]
    weight = operator.attrgetter(str(read.target))(graph_module)
    known = data.meta.get("val") if isinstance(data, Node) else None
    others = [
        other for other in graph_module.graph.nodes if other.op == "get_attr" and other.target == read.target
    ]
    if not isinstance(weight, nn.Parameter) or [user for other in others for user in other.users] != [node]:
        return False
    try:
        found = Contraction.of(equation, held[0], None if known is None else known.dim())
    except UnsupportedError:
        return False
    made = tuple(weight.shape[axis] for axis in found.made)
    matrix = nn.Parameter(found.matrix(weight.detach()).contiguous(), requires_grad=weight.requires_grad)
    owner, _, leaf = str(read.target).rpartition(".")
    setattr(graph_module.get_submodule(owner), leaf, matrix)
    with graph_module.graph.inserting_before(node):
        call = graph_module.graph.call_function
        x = data if moves(found.inward) is None else call(torch.permute, (data, found.inward))
        x = x if len(found.summed) == 1 else call(torch.flatten, (x, -len(found.summed)))
        y = call(F.linear, (x, read))
        y = y if len(made) == 1 else call(torch.unflatten, (y, -1, made))
        y = y if moves(found.outward) is None else call(torch.permute, (y, found.outward))
    y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    graph_module.graph.erase_node(node)
    return True
