"""Graphs with integers for weights, as PT2E converts them: recognised, and made floating-point again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tdpass.models.torch.graphs.held import held, hold, release

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
            value = _value(made, node)
            held_as = nn.Parameter(value, requires_grad=value.is_floating_point())
            path = hold(made, f"{_path(node)}.weight", held_as)
            with made.graph.inserting_before(node):
                node.replace_all_uses_with(made.graph.get_attr(path))
    made.graph.eliminate_dead_code()
    release(made, [*dict(made.named_parameters()), *dict(made.named_buffers())])
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
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), partial(held, graph_module))
    found: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return found.detach()
