"""Graphs whose weights are constants.

Compiled anew for every set of weights, which is found by its identity.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import attrgetter
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from tdpass.dynamo.draft import Compiled, Draft, Inner, all_inputs, getter, sources_of
from tdpass.dynamo.guards import loosen_guards
from tdpass.errors import UsageError
from tdpass.layers.identity_cache import IdentityCache
from tdpass.models.torch.fused.integer_graph import pack_integers, reads_codes
from tdpass.models.torch.graphs.graph_calls import argument, mutates

FROZEN = "tdpass_frozen"  # in the `meta` of a graph whose weights are constants
log = logging.getLogger("tdpass.backend")
_RUNNERS: WeakSet[FrozenRunner] = WeakSet()


def constants(draft: Draft) -> list[int]:
    """Positions of the given inputs that may be constants.

    Parameters, the statistics of batch-norms, and what integer chains are stored as, that nothing writes to.
    """
    found = []
    for index, (node, value) in enumerate(zip(draft.inputs[: draft.given_count], draft.values, strict=False)):
        read = all(_reads_statistics(user, node) or reads_codes(user, node) for user in node.users)
        kept = isinstance(value, nn.Parameter) or (_static(node) and bool(node.users) and read)
        if kept and not any(mutates(user) for user in node.users):
            found.append(index)
    return found


def _static(node: Node) -> bool:
    """Whether an input is a parameter or a buffer of a module."""
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _reads_statistics(user: Node, buffer: Node) -> bool:
    own = user.target is F.batch_norm and not argument(user, 5, "training", default=False)
    return own and buffer in (argument(user, 1, "running_mean"), argument(user, 2, "running_var"))


def freeze(draft: Draft, fixed: Sequence[int], inner: Inner) -> Compiled | None:
    """The compiled graph; None where it reads no weights, or what is derived depends on more than weights."""
    sources = set(sources_of(draft.steps, draft.given_count))
    if not sources <= set(fixed) or not (sources or any(draft.inputs[index].users for index in fixed)):
        return None
    loosen_guards(draft.given.graph, [draft.inputs[index] for index in fixed])
    runner = FrozenRunner(draft, fixed, inner)
    runner.of(runner.read(draft.values))
    return runner


def forget(weights: Sequence[Tensor] | None) -> None:
    """Let graphs that hold these weights, or any, take them anew at the next call."""
    stale = [runner for runner in list(_RUNNERS) if runner.cache.clear(weights)]
    if any(runner.dynamic for runner in stale):
        torch.compiler.reset()


class FrozenRunner:
    """A graph compiled with its weights as constants.

    Other weights in their place are compiled for at the first call with them. Not where sizes are dynamic:
    only Dynamo can guard what a compiler assumes of them, so that then the graph runs uncompiled.
    """

    def __init__(self, draft: Draft, fixed: Sequence[int], inner: Inner) -> None:
        kept = draft.kept()
        self.inner, self.graph, self.steps, self.given_count = (
            inner,
            draft.graph,
            draft.steps,
            draft.given_count,
        )
        self.given: Any = draft.given
        self.names = {
            draft.inputs[index].name: index for index in kept if index in fixed or index >= draft.given_count
        }
        passed = [index for index in kept if index < draft.given_count and index not in fixed]
        self.fakes = [draft.fake_inputs[index] for index in passed]
        read = dict.fromkeys(
            (
                *(index for index in self.names.values() if index < draft.given_count),
                *sources_of(draft.steps, draft.given_count),
            )
        )
        self.sources = tuple(read)
        self.looks = [_look(draft.values[index]) for index in self.sources]
        self.dynamic = not all(_fixed_size(fake) for fake in self.fakes)
        self.recorded = False
        self.cache: IdentityCache[Compiled] = IdentityCache(frozen=True)
        _RUNNERS.add(self)
        self.pass_on, self.read = getter(passed), getter(self.sources)

    def __call__(self, *args: Any) -> Any:
        return self.of(self.read(args))(*self.pass_on(args))

    def of(self, weights: Sequence[Tensor]) -> Compiled:
        """The graph compiled for these weights."""
        return self.cache.get(weights, None, self.build)

    def build(self, sources: Sequence[Tensor]) -> Compiled:
        """Compile for these weights."""
        if [_look(value) for value in sources] != self.looks:
            raise UsageError(
                "a frozen graph met weights of another shape or type; call torch.compiler.reset() to have "
                "it recorded anew"
            )
        known = all_inputs(self.steps, self.given_count, dict(zip(self.sources, sources, strict=True)))
        names = {name: f"constant_{index}" for name, index in self.names.items()}
        values = {names[name]: known[index].detach() for name, index in self.names.items()}
        own = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        graph = _with_constants(self.graph, names)
        module: Any = GraphModule({**{name: attrgetter(name)(self.given) for name in own}, **values}, graph)
        module.meta.update({**self.given.meta, FROZEN: True})
        pack_integers(module)
        if hasattr(self.given, "_param_name_to_source"):
            from torch._dynamo.source import ConstantSource  # noqa: PLC0415 - takes seconds to import

            stored = (*module.named_parameters(), *module.named_buffers())
            module._param_name_to_source = {
                **{name: ConstantSource(name) for name, _ in stored},
                **self.given._param_name_to_source,
            }
        if self.dynamic and self.recorded:
            log.warning(
                "a frozen graph of dynamic sizes met other weights and is not compiled for them; call "
                "torch.compiler.reset()"
            )
            return module.forward  # type: ignore[no-any-return]
        self.recorded = True
        log.info("compiled with %d weights as constants", len(values))
        return self.inner(module, self.fakes)


def _with_constants(graph: Graph, names: dict[str, str]) -> Graph:
    """A copy that reads the named inputs as attributes."""
    made = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in names:
            copies[node] = made.get_attr(names[node.name])
            copies[node].meta = dict(node.meta)
            continue
        copies[node] = made.node_copy(node, lambda read: copies[read])
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    return made


def _fixed_size(fake: Any) -> bool:
    sizes = fake.shape if isinstance(fake, Tensor) else (fake,)
    return not any(isinstance(size, torch.SymInt) for size in sizes)


def _look(value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return value.shape, value.dtype, value.device
