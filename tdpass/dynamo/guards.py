"""What Dynamo checks before every call of a frozen graph.

Which module it is, and no longer all that the module is made of.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from torch._guards import TracingContext
from torch.fx import Graph, Node

_OWN = re.compile(
    rf"^\.(?:{'|'.join(set(vars(nn.Module())) - {'training'})})\b"
)  # what a module holds itself in
_LIBRARY = re.compile(r"G\['__import_(?:torch_dot_nn|tdpass)_(?!.*\._global_)")


def loosen_guards(graph: Graph, weights: Sequence[Node]) -> int:
    """Check that the outermost modules of these weights are the same objects.

    This stands in place of what lies below them; returns how many checks went. Taken as they are: these
    weights, submodules, hooks, and all settings of the layers of torch and tdpass. Still checked: `training`,
    the attributes of other classes, other buffers.
    """
    from torch._dynamo.guards import GuardBuilder  # noqa: PLC0415 - takes seconds to import

    context = TracingContext.try_get()
    sources = {
        name_of(root): root
        for node in weights
        if (root := _outermost(getattr(node, "_dynamo_source", None))) is not None
    }
    if context is None or not sources:
        return 0
    guards = context.guards_context.dynamo_guards
    for root in sources.values():  # first: what is dropped below counts on it
        guards.add(root.make_guard(GuardBuilder.ID_MATCH))
    own = {
        name_of(source) for node in weights if (source := getattr(node, "_dynamo_source", None)) is not None
    }
    layers = _layers(graph)
    gone = [
        guard
        for guard in guards
        if guard.create_fn is not GuardBuilder.ID_MATCH and _is_given(guard, sources, own, layers)
    ]
    guards.inner.difference_update(gone)
    return len(gone)


def name_of(source: Any) -> str:
    """A source as an expression; a method in some versions of torch."""
    name = source.name
    return str(name() if callable(name) else name)


def _outermost(source: Any) -> Any:
    """The outermost module that a source reads from."""
    found = None
    while source is not None:
        if type(source).__name__.endswith("NNModuleSource"):
            found = source
        source = getattr(source, "base", None)
    return found


def _layers(graph: Graph) -> set[str]:
    """The modules of torch and tdpass that are called, in the notation of sources."""
    found = set()
    for node in graph.nodes:
        for path, cls in node.meta.get("nn_module_stack", {}).values():
            if isinstance(cls, type) and cls.__module__.startswith(("torch.nn.", "tdpass.")):
                found.add(path)
    return found


def _is_given(guard: Any, roots: Collection[str], weights: Collection[str], layers: Collection[str]) -> bool:
    """Whether a guard checks what a frozen graph takes as given."""
    name = guard.name
    if _LIBRARY.search(name):
        return True
    root = next((root for root in roots if root in name), None)
    if root is None or name.endswith(".training"):
        return False
    if re.search(r"\._(?:parameters|buffers)\[", name):
        return name in weights
    below = re.match(r"((?:\._modules\['[^']*'\])*)(.*)", name.partition(root)[2], re.DOTALL)
    places, rest = below.groups()  # type: ignore[union-attr]
    path = root + "".join(f".{key}" for key in re.findall(r"\['([^']*)'\]", places))
    return not rest or _OWN.match(rest) is not None or path in layers
