"""Graphs with integers for weights, as PT2E converts them: recognised, and made floating-point again."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_QUANTIZE, _DEQUANTIZE = "quantize_", "dequantize_"
_ADVICE = "compress the floating-point model, or what tdpass.dequantize(model) makes of this one"


def why_graph_quantized(graph_module: GraphModule) -> dict[str, str]:
    """Why layers stay as they are whose weight is dequantized at every call, by the path of their module."""
    return {
        _path(node): f"its weight is quantized ({node.target}); {_ADVICE}"
        for node in _dequantized(graph_module)
        if _constant(node) and _reader(node) is not None
    }


def dequantized_graph(graph_module: GraphModule) -> GraphModule:
    """A copy with floating-point weights in place of integers.

    What is rounded on its way is passed on as it is.  A weight becomes the `weight` of the module that its
    layer came from, where exporting wrote that down.
    """
    made = copy.deepcopy(graph_module)
    made.graph.eliminate_dead_code()
    for node in list(_dequantized(made)):
        source = node.args[0]
        if isinstance(source, Node) and _is(source, _QUANTIZE):
            node.replace_all_uses_with(source.args[0])  # type: ignore[arg-type]
        elif _constant(node):
            path = f"{_path(node)}.weight"
            while path in _read(made):
                path += "_"
            _put(made, path, _value(made, node))
            with made.graph.inserting_before(node):
                node.replace_all_uses_with(made.graph.get_attr(path))
    made.graph.eliminate_dead_code()
    _drop_unread(made)
    made.recompile()
    return made


def _is(node: Node, verb: str) -> bool:
    """Whether a node calls an operator of that verb, of whatever library."""
    return node.op == "call_function" and getattr(node.target, "_opname", "").startswith(verb)


def _dequantized(graph_module: GraphModule) -> Iterator[Node]:
    return (node for node in graph_module.graph.nodes if _is(node, _DEQUANTIZE))


def _constant(node: Node) -> bool:
    """Whether all that a node reads is held by the model."""
    return all(read.op == "get_attr" for read in node.all_input_nodes)


def _reader(node: Node) -> Node | None:
    """The call that reads a weight."""
    return next(iter(node.users), None)


def _path(node: Node) -> str:
    """Of the module that the reader of a weight came from, else of the integers."""
    reader, source = _reader(node), node.all_input_nodes[0]
    stack = {} if reader is None else reader.meta.get("nn_module_stack", {})
    path = next(reversed(stack.values()), ("",))[0] if stack else ""
    return str(path) or str(source.target)


def _value(graph_module: GraphModule, node: Node) -> Tensor:
    """What a node makes of what the model holds."""

    def held(read: Node) -> Any:
        return operator.attrgetter(str(read.target))(graph_module)

    args, kwargs = torch.fx.map_arg(node.args, held), torch.fx.map_arg(node.kwargs, held)
    found: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return found.detach()


def _put(graph_module: GraphModule, path: str, value: Tensor) -> None:
    """Hold a parameter under a path, in a module of its own where something else lies in its way."""
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
    holder._buffers.pop(leaf, None)
    holder.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))


def _read(graph_module: GraphModule) -> Mapping[str, Node]:
    return {str(node.target): node for node in graph_module.graph.nodes if node.op == "get_attr"}


def _drop_unread(graph_module: GraphModule) -> None:
    """Remove the tensors that no node reads, such as weights from before the conversion."""
    read = _read(graph_module)
    called = tuple(f"{node.target}." for node in graph_module.graph.nodes if node.op == "call_module")
    for path in [*dict(graph_module.named_parameters()), *dict(graph_module.named_buffers())]:
        if path not in read and not path.startswith(called):
            owner, _, leaf = path.rpartition(".")
            delattr(graph_module.get_submodule(owner), leaf)
