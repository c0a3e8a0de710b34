"""A tape and its replays.

A replay computes only what it needs: sensitivity analysis forks a replay at a layer and runs the rest of the
network once per candidate, without ever recomputing the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import Self

from tdpass.tape.calls import Call, Ref, leaves, mapped

ADDITIONS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
CHANNELWISE = frozenset(
    {
        "relu",
        "relu_",
        "relu6",
        "silu",
        "gelu",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "leaky_relu",
        "elu",
        "sigmoid",
        "tanh",
        "dropout",
        "clamp",
        "clip",
    }
)

Replacement = Callable[[Tensor], Tensor]
Watch = Callable[[str, Tensor, Tensor], Tensor]


class Playback(Protocol):
    """A run of the model in progress, in which some sites may run as something else.

    A call index is that of the tape the playback was started from.
    """

    replaced: dict[str, Replacement]

    def fork(self, replaced: Mapping[str, Replacement] | None = None) -> Self:
        """A copy from here on, with these sites replaced too."""

    def advance(self, index: int) -> Self:
        """Go to just before call `index`; from the start again where that is behind."""

    def input_of(self, index: int) -> Tensor | None:
        """The activation that site call `index`, the next one, is about to read.

        None where this run does not come there.
        """

    def step(self) -> Tensor | None:
        """The output of the site call that is next; None where this run does not come there."""

    def value(self, number: int) -> Tensor | None:
        """The value with that number, where it is at hand."""

    def finish(self, watch: Watch | None = None) -> Any:
        """Run to the end; returns what the model would have returned.

        `watch(site, x, y)` is told of every call of a site on the way and answers with the output to go on
        with, mostly `y`.
        """


@dataclass
class Tape:
    """The recorded calls of one run; `inputs` are the values it was run on, `output` what it returned.

    `doubt` says why a replay may differ from what the model would do with a layer replaced; empty where every
    tensor that a call reads is an input, was made by a call, or was held by the model before.
    """

    calls: list[Call]
    inputs: dict[int, Tensor]
    output: Any
    batch_size: int
    doubt: str = ""
    last_read: dict[int, int] = field(init=False, default_factory=dict)
    site_calls: dict[str, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._readers: dict[int, list[int]] = {}
        for index, call in enumerate(self.calls):
            for number in dict.fromkeys(call.reads()):
                self._readers.setdefault(number, []).append(index)
            if call.site is not None:
                self.site_calls.setdefault(call.site, []).append(index)
        self._returned = {leaf.number for leaf in leaves(self.output) if isinstance(leaf, Ref)}
        self.last_read.update((number, indices[-1]) for number, indices in self._readers.items())
        self.last_read.update((number, len(self.calls)) for number in self._returned)

    @property
    def note(self) -> str:
        """What a user should know of how the run is repeated; empty where there is nothing to say."""
        return ""

    def readers(self, number: int) -> list[int]:
        """The calls that use a value."""
        return self._readers.get(number, [])

    def is_output(self, number: int) -> bool:
        """Whether the run returned that value."""
        return number in self._returned

    def residual_partner(self, index: int) -> int | None:
        """The other summand, where the value made by call `index` is used once and that is in a sum."""
        number = next(self.calls[index].writes())
        readers = self.readers(number)
        if len(readers) != 1 or self.is_output(number):
            return None
        call = self.calls[readers[0]]
        summands = [arg for arg in call.args if isinstance(arg, Ref)]
        if call.name not in ADDITIONS or len(call.args) != 2 or len(summands) != 2 or call.kwargs:
            return None
        return next((arg.number for arg in summands if arg.number != number), None)

    def channelwise_consumer(self, index: int) -> int | None:
        """The one site call that reads the value of call `index`, through element-wise functions only."""
        number = next(self.calls[index].writes())
        while True:
            readers = self.readers(number)
            if len(readers) != 1 or self.is_output(number):
                return None
            call = self.calls[readers[0]]
            if call.site is not None:
                return readers[0] if call.args[0] == Ref(number) else None
            written = list(call.writes())
            tensors = [
                leaf for leaf in leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Ref | Tensor)
            ]
            if call.name not in CHANNELWISE or len(written) != 1 or len(tensors) != 1:
                return None
            number = written[0]

    def play(self, inputs: Mapping[int, Tensor] | None = None) -> Playback:
        """Start a replay, by default on the recorded inputs."""
        return _Replay(self, dict(self.inputs if inputs is None else inputs))


def site_order(tapes: Iterable[Tape]) -> list[str]:
    """Every site that some run calls, by first call.

    One that the first run leaves out comes after what precedes it in another.
    """
    order: list[str] = []
    for tape in tapes:
        place = 0
        for name in tape.site_calls:
            if name in order:
                place = order.index(name) + 1
            else:
                order.insert(place, name)
                place += 1
    return order


@dataclass
class _Replay:
    """A replay of the recorded calls: the values still needed, and the next call."""

    tape: Tape
    values: dict[int, Tensor]
    position: int = 0
    replaced: dict[str, Replacement] = field(default_factory=dict)
    start: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = self.start or dict(self.values)

    def fork(self, replaced: Mapping[str, Replacement] | None = None) -> _Replay:
        """A copy from here on; values are shared, since a replay never changes one in place."""
        return _Replay(
            self.tape, dict(self.values), self.position, {**self.replaced, **(replaced or {})}, self.start
        )

    def advance(self, index: int) -> _Replay:
        if index < self.position:
            self.values, self.position = dict(self.start), 0
        while self.position < index:
            self._step()
        return self

    def input_of(self, index: int) -> Tensor | None:
        return self._fill(self.tape.calls[index].args[0])  # type: ignore[no-any-return]

    def step(self) -> Tensor | None:
        return self._step()  # type: ignore[no-any-return]

    def value(self, number: int) -> Tensor | None:
        return self.values.get(number)

    def finish(self, watch: Watch | None = None) -> Any:
        while self.position < len(self.tape.calls):
            self._step(watch)
        return self._fill(self.tape.output)

    def _step(self, watch: Watch | None = None) -> Any:
        call = self.tape.calls[self.position]
        with call.context():
            result = self._result(call)
        if watch is not None and call.site is not None:
            result = watch(call.site, self._fill(call.args[0]), result)
        for number, value in zip(leaves(call.output), tree_leaves(result), strict=True):
            if isinstance(number, Ref):
                self.values[number.number] = value
        last = self.tape.last_read
        for number in {*call.reads(), *call.writes()}:
            if last.get(number, -1) <= self.position:
                self.values.pop(number, None)
        self.position += 1
        return result

    def _result(self, call: Call) -> Any:
        replace = self.replaced.get(call.site) if call.site is not None else None
        if replace is not None:
            return replace(self._fill(call.args[0]))
        args, kwargs = self._fill(call.args), self._fill(dict(call.kwargs))
        if call.mutates:
            args = (args[0].clone(), *args[1:])
        result = call.func(*args, **kwargs)
        return args[0] if call.mutates and not isinstance(result, torch.Tensor) else result

    def _fill(self, tree: Any) -> Any:
        return mapped(lambda leaf: self.values[leaf.number] if isinstance(leaf, Ref) else leaf, tree)
