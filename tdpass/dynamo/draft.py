"""A rewritten copy of a graph that Dynamo recorded.

Weights stay inputs, and what is derived from them enters as further inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from tdpass.layers.derived import DERIVED, Recipe, Tensors, derived

Compiled = Callable[..., Any]
Inner = Callable[[GraphModule, Sequence[Any]], Compiled]


@dataclass(frozen=True)
class Step:
    """Further inputs that a recipe makes of the inputs `sources`."""

    recipe: Recipe[Tensors]
    sources: tuple[int, ...]


class Draft:
    """The copy, while it is being rewritten; the graph that Dynamo gave is left as it was.

    One compiled graph serves every instance of a class, so no weight may be baked into it: what is derived
    from weights is looked up at every call, by the identity of the weights that came in.
    """

    def __init__(self, given: GraphModule, examples: Sequence[Any], *, frozen: bool = False) -> None:
        self.given, self.frozen = given, frozen
        self.graph = Graph()
        copies: dict[Node, Node] = {}
        self.graph.output(self.graph.graph_copy(given.graph, copies))
        for old, new in copies.items():
            if hasattr(old, "_dynamo_source"):  # what compilers read of an input, and fx does not copy
                new._dynamo_source = old._dynamo_source
        self.inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.values: list[Any] = list(examples)
        self.given_count = len(self.inputs)
        self.fake_inputs: list[Any] = list(examples)
        self.steps: list[Step] = []
        # the graph was recorded in one fake mode and is compiled in another
        self._fake_mode: Any = detect_fake_mode(examples) or getattr(
            TracingContext.try_get(), "fake_mode", None
        )
        recorded = (node.meta.get("example_value") for node in self.inputs)
        self._recorded: Any = next(
            (value.fake_mode for value in recorded if isinstance(value, FakeTensor)), None
        )

    @property
    def rewritable(self) -> bool:
        """Whether the weights are there to be read."""
        known = None not in (self._fake_mode, self._recorded) and len(self.inputs) == len(self.values)
        return known and not any(isinstance(value, FakeTensor) for value in self.values)

    @property
    def stored(self) -> set[Node]:
        """The inputs that are weights."""
        pairs = zip(self.inputs, self.values, strict=True)
        return {
            node
            for index, (node, value) in enumerate(pairs)
            if isinstance(value, nn.Parameter) or index >= self.given_count
        }

    def value_of(self, node: Node) -> Any:
        """What was given for an input."""
        return self.values[self.inputs.index(node)]

    def derive(self, recipe: Recipe[Tensors], sources: Sequence[Node]) -> list[Node]:
        """Further inputs: what the recipe makes of these."""
        indices = tuple(self.inputs.index(node) for node in sources)
        made = derived(recipe, [self.values[index] for index in indices])
        self.steps.append(Step(recipe, indices))
        added: list[Node] = []
        for tensor in made:
            with self.graph.inserting_after(self.inputs[-1]):
                node = self.graph.placeholder(f"derived_{len(self.inputs)}")
            node._dynamo_source = None
            # sizes of weights are constants: a symbol would be shared with a batch that happens to be of that
            # size
            node.meta["example_value"] = self._recorded.from_tensor(tensor, static_shapes=True)
            self.inputs.append(node)
            self.values.append(tensor)
            self.fake_inputs.append(self._fake_mode.from_tensor(tensor, static_shapes=True))
            added.append(node)
        return added

    def call(self, function: Callable[..., Any], *args: Any) -> Node:
        """A call with its fake result, put where the graph is being written."""
        node = self.graph.call_function(function, args)
        with self._recorded, torch.no_grad():
            node.meta["example_value"] = function(
                *torch.fx.map_arg(args, lambda read: read.meta["example_value"])
            )
        return node

    def replace(self, nodes: Sequence[Node], result: Node) -> None:
        """Let the result stand for the last of these calls, and remove them all."""
        nodes[-1].replace_all_uses_with(result)
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def kept(self) -> list[int]:
        """Positions of the inputs that are read; the others leave the graph."""
        kept = [
            index
            for index, node in enumerate(self.inputs)
            if node.users or not isinstance(self.values[index], Tensor)
        ]
        for index in set(range(len(self.inputs))).difference(kept):
            self.graph.erase_node(self.inputs[index])
        return kept

    def compile(self, inner: Inner) -> Compiled:
        """The graph handed on, behind a function that takes what Dynamo passes and looks up the rest."""
        kept = self.kept()
        module = GraphModule(self.given, self.graph)
        module.meta.update(self.given.meta)
        if hasattr(self.given, "_param_name_to_source"):
            module._param_name_to_source = self.given._param_name_to_source
        run = inner(module, [self.fake_inputs[index] for index in kept])
        passed = [index for index in kept if index < self.given_count]
        return _Runner(
            run, passed, self.steps, [index for index in kept if index >= self.given_count], self.given_count
        )


class _Runner:
    """A compiled graph whose derived inputs are looked up at every call."""

    def __init__(
        self, run: Compiled, passed: Sequence[int], steps: Sequence[Step], extras: Sequence[int], given: int
    ) -> None:
        self.run, self.steps, self.extras, self.given = run, steps, extras, given
        self.sources = sources_of(steps, given)
        self.token = object()
        self.pass_on, self.read = getter(passed), getter(self.sources)

    def __call__(self, *args: Any) -> Any:
        extras: Tensors = DERIVED.get(self.read(args), self.token, self.derive)
        return self.run(*self.pass_on(args), *extras)

    def derive(self, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All further inputs, from the weights."""
        known = all_inputs(self.steps, self.given, dict(zip(self.sources, sources, strict=True)))
        return tuple(known[index] for index in self.extras)


def sources_of(steps: Sequence[Step], given: int) -> tuple[int, ...]:
    """The inputs, of those given, that the steps read."""
    return tuple(dict.fromkeys(index for step in steps for index in step.sources if index < given))


def all_inputs(steps: Sequence[Step], given: int, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """These inputs and what the steps derive from them, by position."""
    found, number = dict(known), given
    for step in steps:
        for tensor in derived(step.recipe, [found[index] for index in step.sources]):
            found[number] = tensor
            number += 1
    return found


def getter(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """These items of a sequence, as a tuple."""
    if len(indices) < 2:
        return lambda args: tuple(args[index] for index in indices)
    return operator.itemgetter(*indices)
