"""What an fx graph reads of its module: read, put in place, and removed."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node


def targets_read(graph_module: GraphModule) -> set[str]:
    """The paths of all that the graph reads."""
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}


def held(graph_module: GraphModule, read: Node) -> Any:
    """What a node reads."""
    return operator.attrgetter(str(read.target))(graph_module)


def hold(graph_module: GraphModule, path: str, value: Tensor, over: Collection[str] = ()) -> str:
    """Hold a parameter or a buffer under a path; returns the path.

    It is in a module of its own where something else lies in its way, and gets another name where the graph
    reads the path, unless that is among those that it stands `over`.
    """
    taken = targets_read(graph_module).difference(over)
    while path in taken:
        path += "_"
    owner, _, leaf = path.rpartition(".")
    holder: nn.Module = graph_module
    for name in filter(None, owner.split(".")):
        inner = holder._modules.get(name)
        if inner is None:
            if hasattr(holder, name):
                delattr(holder, name)
            inner = nn.Module()
            holder.add_module(name, inner)
        holder = inner
    for kept in (holder._buffers, holder._parameters):
        kept.pop(leaf, None)
    if isinstance(value, nn.Parameter):
        holder.register_parameter(leaf, value)
    else:
        holder.register_buffer(leaf, value)
    return path


def release(graph_module: GraphModule, paths: Iterable[str]) -> None:
    """Remove the tensors under these paths that nothing of the graph reads or calls."""
    read = targets_read(graph_module)
    called = tuple(f"{node.target}." for node in graph_module.graph.nodes if node.op == "call_module")
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        if path in read or path.startswith(called):
            continue
        try:
            holder = graph_module.get_submodule(owner)
        except AttributeError:  # what took its place is no module
            continue
        if leaf in holder._parameters or leaf in holder._buffers:
            delattr(holder, leaf)
