"""What one recorded run shows of who reads which tensor, and through which modules layers are called."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tdpass.models.torch.modules.in_place import watching
from tdpass.models.torch.sites.sites import Matched
from tdpass.ops import own_bias
from tdpass.tape import Call, Tape
from tdpass.tape.calls import leaves


@dataclass(frozen=True)
class Run:
    """A recorded run, and a second one with counts of how often forwards were entered.

    Forwards are counted by id of the module; how often sites' weights were used is counted too. `more` holds
    the ids of modules that were given more than their input.
    """

    tape: Tape
    entered: Mapping[int, int]
    used: Mapping[str, int]
    more: AbstractSet[int]

    def readers(self, tensor: Tensor) -> list[int]:
        """The calls that read a tensor of the model or a view of it made earlier.

        Past the last call: the run returned it.
        """
        return [
            place
            for place, constants in enumerate(self._constants)
            if any(overlap(constant, tensor) for constant in constants)
        ]

    @cached_property
    def _constants(self) -> list[list[Tensor]]:
        return [
            *(_constants((call.args, dict(call.kwargs))) for call in self.tape.calls),
            _constants(self.tape.output),
        ]


@contextmanager
def entering(modules: Iterable[nn.Module]) -> Iterator[tuple[Mapping[int, int], AbstractSet[int]]]:
    """Count by id the calls that reach the forward of each module.

    And which of these took more than an input.
    """
    entered: Counter[int] = Counter()
    more: set[int] = set()

    def see(module: nn.Module, args: tuple[object, ...]) -> None:
        entered[id(module)] += 1
        if len(args) > 1:
            more.add(id(module))

    with watching(modules, see):
        yield entered, more


def other_readers(run: Run, sites: Mapping[str, Matched]) -> dict[str, str]:
    """Why sites must stay dense: something besides the calls of their layers reads their weight or bias."""
    found: dict[str, str] = {}
    index = _Index(sites)
    for call in run.tape.calls:
        for name, what in index.of(_foreign(call)):
            found.setdefault(name, f"its {what} is also read by {call.name}, which needs it dense")
    for name, what in index.of(_constants(run.tape.output)):
        found.setdefault(name, f"its {what} is returned by the model, which needs it dense")
    for name, matched in sites.items():
        if any(id(module) in run.more for module in matched.modules):
            found.setdefault(
                name,
                "it is called with more than its input, such as an output size, which a factored layer does "
                "not take",
            )
        if sum(run.entered[id(module)] for module in matched.modules) != run.used.get(name, 0):
            found.setdefault(
                name,
                "its weight is also used without calling the layer: by a function, or by a forward that was "
                "captured earlier",
            )
    return found


def graph_readers(graph_module: GraphModule, sites: Mapping[str, Matched]) -> dict[str, str]:
    """Why sites of a graph must stay dense.

    A node besides the calls of their layers reads their weight or bias.
    """
    found: dict[str, str] = {}
    index = _Index(sites)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.users:
            for name, what in index.of(_constants(operator.attrgetter(str(node.target))(graph_module))):
                found.setdefault(
                    name, f"its {what} is also read by {next(iter(node.users))}, which needs it dense"
                )
    return found


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share memory."""
    if one.is_meta or other.is_meta or not one.numel() or not other.numel():
        return one is other
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


class _Index:
    """Sites by the memory of their weights and biases."""

    def __init__(self, sites: Mapping[str, Matched]) -> None:
        tensors = [(name, "weight", matched.weight) for name, matched in sites.items()]
        tensors += [
            (name, "bias", bias)
            for name, matched in sites.items()
            for bias in matched.biases
            if bias is not None
        ]
        self._spans = [(*_span(tensor), name, what) for name, what, tensor in tensors if not tensor.is_meta]

    def of(self, values: Iterable[Tensor]) -> Iterator[tuple[str, str]]:
        """Site, and 'weight' or 'bias', for everything that shares memory with one of the values."""
        for value in values:
            if not value.is_meta and value.numel():
                start, end = _span(value)
                yield from ((name, what) for a, b, name, what in self._spans if a < end and start < b)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address, and the one after the last."""
    if tensor.layout is not torch.strided:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _constants(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _foreign(call: Call) -> list[Tensor]:
    """What a call reads of the model; of a layer's call, without its weight and bias."""
    if call.func is own_bias:
        return []
    if call.site is None:
        return _constants((call.args, dict(call.kwargs)))
    return _constants(
        (
            call.args[0],
            call.args[3:],
            {name: value for name, value in call.kwargs.items() if name not in ("weight", "bias")},
        )
    )
