"""Recurrence in an fx graph as the modules that it came from, so that the pass `divide` opens it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

_aten = torch.ops.aten
_LAYERS: dict[Any, tuple[type[nn.RNNBase], dict[str, str]]] = {
    _aten.lstm.input: (nn.LSTM, {}),
    _aten.gru.input: (nn.GRU, {}),
    _aten.rnn_tanh.input: (nn.RNN, {}),
    _aten.rnn_relu.input: (nn.RNN, {"nonlinearity": "relu"}),
}
_CELLS: dict[Any, tuple[type[nn.RNNCellBase], dict[str, str]]] = {
    _aten.lstm_cell.default: (nn.LSTMCell, {}),
    _aten.gru_cell.default: (nn.GRUCell, {}),
    _aten.rnn_tanh_cell.default: (nn.RNNCell, {}),
    _aten.rnn_relu_cell.default: (nn.RNNCell, {"nonlinearity": "relu"}),
}
_ENDS = ("ih", "hh")


def lift_recurrent(graph_module: GraphModule) -> bool:
    """Let modules of torch.nn run what the graph runs by functions of stored weights, in place.

    Returns whether any does. Each stands where its weights were, which nothing else may read. The outputs do
    not change.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _LAYERS:
            changed = _layer(graph_module, node) or changed
        elif node.op == "call_function" and node.target in _CELLS:
            changed = _cell(graph_module, node) or changed
    if changed:
        graph_module.graph.eliminate_dead_code()
    return changed


def _layer(graph_module: GraphModule, node: Node) -> bool:
    given: Any = node.args
    x, states, reads, biased, layers, dropout, training, both, batch_first = given
    cls, options = _LAYERS[node.target]
    path = owner_of(graph_module, node, reads)
    if path is None or training:
        return False
    held: list[Any] = [operator.attrgetter(str(read.target))(graph_module) for read in reads]
    gates = held[1].shape[0] // {nn.LSTM: 4, nn.GRU: 3}.get(cls, 1)
    projected = held[1].shape[1] if held[1].shape[1] < gates else 0
    said: dict[str, Any] = {**options, **({"proj_size": projected} if projected else {})}
    module = cls(
        held[0].shape[1], gates, layers, bias=biased, batch_first=batch_first, dropout=dropout,
        bidirectional=both, device="meta", **said,
    )  # fmt: skip
    names = [name for names in module._all_weights for name in names]
    put(graph_module, path, module, names, held)
    call = called(graph_module, node, path, (x, tuple(states) if cls is nn.LSTM else states))
    if cls is nn.LSTM:
        _apart(graph_module, node, call)
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)
    return True


def _cell(graph_module: GraphModule, node: Node) -> bool:
    given: Any = node.args
    x, state, *reads = given
    cls, options = _CELLS[node.target]
    reads = [read for read in reads if read is not None]
    path = owner_of(graph_module, node, reads)
    if path is None:
        return False
    held: list[Any] = [operator.attrgetter(str(read.target))(graph_module) for read in reads]
    biased = len(held) > len(_ENDS)
    said: dict[str, Any] = dict(options)
    module = cls(held[0].shape[1], held[1].shape[1], bias=biased, device="meta", **said)
    names = [f"{part}_{end}" for part in ("weight", "bias")[: 1 + biased] for end in _ENDS]
    put(graph_module, path, module, names, held)
    call = called(graph_module, node, path, (x, tuple(state) if cls is nn.LSTMCell else state))
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)
    return True


def owner_of(graph_module: GraphModule, node: Node, reads: Any) -> str | None:
    """The path of the module that holds all of these and nothing more.

    It is None where there is none, or another function reads one.
    """
    if not all(isinstance(read, Node) and read.op == "get_attr" for read in reads):
        return None
    targets = {str(read.target) for read in reads}
    owners = {target.rpartition(".")[0] for target in targets}
    path = owners.pop()
    readers = [user for read in reads for user in read.users]
    alike = all(user.target is node.target and {*reads} <= {*user.all_input_nodes} for user in readers)
    if owners or not path or not alike:
        return None
    holder = graph_module.get_submodule(path)
    own = {f"{path}.{name}" for name in (*holder._parameters, *holder._buffers)}
    parameters = all(isinstance(operator.attrgetter(name)(graph_module), nn.Parameter) for name in targets)
    return path if own == targets and not holder._modules and parameters else None


def put(
    graph_module: GraphModule, path: str, module: nn.Module, names: Sequence[str], held: Sequence[Any]
) -> None:
    """Let a module of the graph's stand at a path, with parameters that are held already."""
    for name, parameter in zip(names, held, strict=True):
        setattr(module, name, parameter)
    module.eval()
    graph_module.add_submodule(path, module)


def called(graph_module: GraphModule, node: Node, path: str, given: Any) -> Node:
    """Call the module at a path, with these arguments, before a node, of which it has the metadata."""
    with graph_module.graph.inserting_before(node):
        call: Node = graph_module.graph.call_module(path, given)
    call.meta = dict(node.meta)
    return call


def _apart(graph_module: GraphModule, node: Node, call: Node) -> None:
    """What reads `y, h, c` of the function reads `y, (h, c)` of the module."""
    for user in list(node.users):
        place: Any = user.args[1]
        if place == 0:
            continue
        with graph_module.graph.inserting_before(user):
            states = graph_module.graph.call_function(operator.getitem, (call, 1))
            state = graph_module.graph.call_function(operator.getitem, (states, place - 1))
        state.meta = dict(user.meta)
        user.replace_all_uses_with(state)
        graph_module.graph.erase_node(user)
