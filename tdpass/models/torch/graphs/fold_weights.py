"""Weights that an fx graph computes whenever it runs, from stored tensors alone, as parameters of their own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tdpass.models.torch.graphs.held import held, hold, release
from tdpass.tape.slices import MOVES

IsLayer = Callable[[Node], bool]
_ONLY_MOVED = MOVES | {"getitem", "slice", "alias"}


@dataclass(frozen=True)
class _Computed:
    """Tensors that are computed from the same stored ones: these by path, and the nodes that make those."""

    sources: frozenset[str]
    made: tuple[Node, ...]


def fold_weights(graph_module: GraphModule, is_layer: IsLayer, *, moved_only: bool = False) -> list[str]:
    """Store what layers read of computed tensors in place of what it is computed from; returns their paths.

    So norms and slices of weights leave the graph; with `moved_only` just what is cut, reshaped or permuted.
    `is_layer` says which calls read weights.  A tensor stays computed where something else reads what it is
    made of, or where it would take more room than that.  Works in place; the outputs do not change.
    """
    sources = _sources(graph_module, moved_only)
    found = [one for one in _computed(sources) if _worth(graph_module, one, sources, is_layer)]
    paths = [path for one in found for path in _fold(graph_module, one, sources, is_layer, moved_only)]
    if paths:
        graph_module.graph.eliminate_dead_code()
        release(graph_module, [target for one in found for target in one.sources])
        graph_module.delete_all_unused_submodules()
        graph_module.recompile()
    return paths


def _sources(graph_module: GraphModule, moved_only: bool) -> dict[Node, frozenset[str]]:
    """The nodes that depend on stored tensors alone, in order, with the paths of these."""
    found: dict[Node, frozenset[str]] = {}
    seen: dict[str, Node] = {}
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr" and isinstance(held(graph_module, node), Tensor):
            found[node] = frozenset({str(node.target)})
            continue
        inputs = node.all_input_nodes
        if not inputs or not all(read in found for read in inputs) or not _pure(node, moved_only):
            continue
        first = seen.setdefault(str((node.target, node.args, node.kwargs)), node)
        if first is node:
            found[node] = frozenset().union(*(found[read] for read in inputs))
        else:  # a layer that is called twice
            node.replace_all_uses_with(first)
            graph_module.graph.erase_node(node)
    return found


def _pure(node: Node, moved_only: bool) -> bool:
    """Whether a node makes the same of the same whenever it runs, and changes nothing."""
    if node.op != "call_function":
        return False
    if moved_only:
        return getattr(node.target, "_opname", getattr(node.target, "__name__", "")) in _ONLY_MOVED
    schema = getattr(node.target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.target is operator.getitem or (schema is not None and not schema.is_mutable and not random)


def _computed(sources: dict[Node, frozenset[str]]) -> list[_Computed]:
    """What other nodes read, those together that share a source."""
    found: list[_Computed] = []
    for node, paths in sources.items():
        if node.op == "get_attr" or all(user in sources for user in node.users):
            continue
        alike = [one for one in found if one.sources & paths]
        whole = _Computed(
            paths.union(*(one.sources for one in alike)),
            (*(made for one in alike for made in one.made), node),
        )
        found = [*(one for one in found if one not in alike), whole]
    return found


def _worth(
    graph_module: GraphModule, one: _Computed, sources: dict[Node, frozenset[str]], is_layer: IsLayer
) -> bool:
    """Whether layers read what is made, nothing else reads what it is made of, and it takes no more room."""
    reads = [node for node in sources if node.op == "get_attr" and str(node.target) in one.sources]
    values = [node.meta.get("val") for node in one.made]
    called = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    of_modules = {id(own) for node in called for own in _module(graph_module, node).parameters()}
    apart = all(user in sources for read in reads for user in read.users) and not any(
        id(held(graph_module, read)) in of_modules for read in reads
    )
    if not apart or not all(isinstance(value, Tensor) for value in values):
        return False
    stored = sum({str(read.target): held(graph_module, read).numel() for read in reads}.values())
    read_by_layers = any(is_layer(user) for node in one.made for user in node.users)
    return read_by_layers and sum(value.numel() for value in values) <= stored  # type: ignore[union-attr]


def _module(graph_module: GraphModule, node: Node) -> nn.Module:
    return graph_module.get_submodule(str(node.target))


def _fold(
    graph_module: GraphModule,
    one: _Computed,
    sources: dict[Node, frozenset[str]],
    is_layer: IsLayer,
    moved_only: bool,
) -> Iterator[str]:
    """Put parameters in the place of what other nodes read."""
    values = _values(graph_module, [node for node, paths in sources.items() if paths <= one.sources])
    trained = any(value.requires_grad for value in values.values() if isinstance(value, nn.Parameter))
    weights = [node for node in one.made if values[node].dim() > 1 and any(map(is_layer, node.users))]
    origin = min(one.sources)
    for place, node in enumerate(one.made):
        path = f"{origin}.{place}.weight" if len(one.made) > 1 else origin
        if weights == [node] and not moved_only:
            path = f"{_caller(node)}.weight".lstrip(".")
        value = values[node].detach().clone(memory_format=torch.contiguous_format)
        floats = value.is_floating_point()
        path = hold(graph_module, path, nn.Parameter(value, trained) if floats else value, one.sources)
        with graph_module.graph.inserting_before(node):
            read = graph_module.graph.get_attr(path)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read, delete_user_cb=lambda user: user not in sources)
        yield path


def _values(graph_module: GraphModule, nodes: Sequence[Node]) -> dict[Node, Any]:
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.get)
            computed: Any = node.target
            values[node] = held(graph_module, node) if node.op == "get_attr" else computed(*args, **kwargs)
    return values


def _caller(node: Node) -> str:
    """The path of the module that calls what reads a weight."""
    stacks = [user.meta.get("nn_module_stack") or {} for user in node.users]
    return next((str(path) for stack in stacks for path, _ in reversed(list(stack.values()))), "")
