"""Branches and loop bodies run with torch functions, so that their layers are recorded like any other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.models.onnx.graph.deadline import loop_seconds, too_long
from tdpass.models.onnx.graph.functions import numbers

Values = dict[ir.Value, Tensor]
_SCAN_WITHOUT_SAMPLES = 9


class Step(Protocol):
    """Something that reads values and makes others."""

    fixed: bool

    @property
    def reads(self) -> Sequence[ir.Value]:
        """The values that it needs."""

    @property
    def outputs(self) -> Sequence[ir.Value]:
        """The values that it makes, as the graph has them."""

    def run(self, values: Values) -> None:
        """Make them."""


@dataclass
class Block:
    """The steps of one graph; what they make is dropped after its last reader in it."""

    graph: ir.Graph
    steps: Sequence[Step]
    perform: Callable[[Step, Values], None]
    _last_read: Mapping[ir.Value, int] = field(init=False)
    _own: frozenset[ir.Value] = field(init=False)

    def __post_init__(self) -> None:
        self._last_read = {value: place for place, step in enumerate(self.steps) for value in step.reads}
        made = (value for step in self.steps for value in step.outputs)
        self._own = frozenset((*self.graph.inputs, *made)) - set(self.graph.outputs)

    def run(self, values: Values) -> None:
        """Make the graph's outputs from its inputs.

        The inputs are among the values, with all that the graph reads from outside.
        """
        for place, step in enumerate(self.steps):
            self.perform(step, values)
            for value in step.reads:
                if self._last_read[value] == place and value in self._own:
                    values.pop(value, None)

    def call(self, values: Values, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Its outputs for these inputs."""
        values.update(zip(self.graph.inputs, inputs, strict=True))
        self.run(values)
        return [values[value] for value in self.graph.outputs]


@dataclass
class Control:
    """A node with bodies: what it reads itself, and from outside in its bodies."""

    node: ir.Node
    bodies: Mapping[str, Block]
    captured: Sequence[ir.Value]
    fixed: bool = False

    @property
    def reads(self) -> Sequence[ir.Value]:
        return (*(value for value in self.node.inputs if value is not None), *self.captured)

    @property
    def outputs(self) -> Sequence[ir.Value]:
        return self.node.outputs

    def run(self, values: Values) -> None:
        given = [None if value is None else values[value] for value in self.node.inputs]
        made = _RUN[self.node.op_type](self, given, values)
        values.update(zip(self.node.outputs, made, strict=True))

    def ints(self, name: str, count: int) -> Sequence[int]:
        """A list of numbers, by default zeros."""
        return self.node.attributes.get_ints(name, (0,) * count)


def _if(step: Control, given: Sequence[Tensor | None], values: Values) -> Sequence[Tensor]:
    (condition,) = given
    assert condition is not None
    return step.bodies["then_branch" if bool(condition) else "else_branch"].call(values, ())


def _loop(step: Control, given: Sequence[Tensor | None], values: Values) -> Sequence[Tensor]:
    limit, condition, *initial = given
    body, most = step.bodies["body"], None if limit is None else numbers(limit)[0]
    states = [_present(state) for state in initial]
    going, count, made = condition is None or bool(condition), 0, list[list[Tensor]]()
    end = time.monotonic() + loop_seconds()
    while going and (most is None or count < most):
        if time.monotonic() > end:
            raise too_long()
        holds = torch.ones((), dtype=torch.bool) if condition is None else condition
        condition, *rest = body.call(values, [torch.tensor(count), holds, *states])
        states, elements = rest[: len(states)], rest[len(states) :]
        made = [[*seen, new] for seen, new in zip(made or [[] for _ in elements], elements, strict=True)]
        going, count = bool(condition), count + 1
    if len(made) != len(step.node.outputs) - len(states):
        raise UnsupportedError(
            f"the loop {step.node.name!r} was left before its first round, so that the sizes of what it "
            "collects are not known; give data on which it runs"
        )
    return [*states, *(torch.stack(elements) for elements in made)]


def _scan(step: Control, given: Sequence[Tensor | None], values: Values) -> Sequence[Tensor]:
    scanned = int(step.node.attributes["num_scan_inputs"].as_int())
    tensors = [_present(tensor) for tensor in given]
    states, sequences = tensors[: len(tensors) - scanned], tensors[len(tensors) - scanned :]
    axes, back = step.ints("scan_input_axes", scanned), step.ints("scan_input_directions", scanned)
    parts = [x.unbind(axis) for x, axis in zip(sequences, axes, strict=True)]
    parts = [part[::-1] if reverse else part for part, reverse in zip(parts, back, strict=True)]
    collected = len(step.node.outputs) - len(states)
    made: list[list[Tensor]] = [[] for _ in range(collected)]
    for elements in zip(*parts, strict=True):
        results = step.bodies["body"].call(values, [*states, *elements])
        states = results[: len(states)]
        for seen, new in zip(made, results[len(states) :], strict=True):
            seen.append(new)
    ends, towards = step.ints("scan_output_axes", collected), step.ints("scan_output_directions", collected)
    return [
        *states,
        *(
            torch.stack(seen[::-1] if reverse else seen, axis)
            for seen, axis, reverse in zip(made, ends, towards, strict=True)
        ),
    ]


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


_RUN: Mapping[str, Callable[[Control, Sequence[Tensor | None], Values], Sequence[Tensor]]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
}


def runs_bodies(node: ir.Node, opset: int) -> bool:
    """Whether the bodies of a node can be run here, so that their layers can be recorded and replaced."""
    if node.domain or node.op_type not in _RUN:
        return False
    return node.op_type != "Scan" or opset >= _SCAN_WITHOUT_SAMPLES
