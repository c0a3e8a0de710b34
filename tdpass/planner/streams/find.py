"""Which values of a run share their channels with which, and who writes and reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tdpass.kinds import is_layer_call
from tdpass.ops import transposed_linear
from tdpass.planner.streams.norms import Norm, find_norms
from tdpass.planner.streams.stream import Stream, Streams, Sum
from tdpass.planner.streams.values import Values, key_of, operands, written
from tdpass.tape import ADDITIONS, Call, Ref, Tape, leaves
from tdpass.tape.calls import argument

_SAME = 1e-4
_TABLES = {"embedding": (1, "weight"), "index_select": (0, "input")}
_FORWARD = frozenset({"linear", "transposed_linear", "conv1d", "conv2d", "conv3d"})
_AXES = (0, 1)
_SUMMANDS = 2


def find_streams(tape: Tape, *, apart: bool = False) -> Streams:
    """The streams of a recorded run of a few samples, which is repeated once.

    With `apart`, a residual sum begins a stream of its own where one of its summands is what a norm reads.
    """
    values = Values.of(tape)
    norms = find_norms(values)
    return _Finder(values, norms, {norm.reads: norm for norm in reversed(norms)} if apart else {}).found()


@dataclass
class _Finder:
    """Walks a run front to back; `axis` says where the channels of a value lie, by key.

    `normed` are the norms behind whose input a sum may begin another stream, by the number of that.
    """

    values: Values
    norms: Sequence[Norm]
    normed: dict[int, Norm]
    group: dict[int, int] = field(default_factory=dict)
    axis: dict[int, int] = field(default_factory=dict)
    parents: list[int] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    sides: dict[tuple[int, str], int] = field(default_factory=dict)
    biases: dict[int, Tensor | None] = field(default_factory=dict)
    turns: dict[int, Tensor] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)
    transposed: set[int] = field(default_factory=set)

    def found(self) -> Streams:
        inner = {place for norm in self.norms for place in norm.calls}
        last = {max(norm.calls): norm for norm in self.norms}
        for place, call in enumerate(self.values.tape.calls):
            if place in last:
                self._norm(last[place])
            elif place in inner:
                continue
            elif is_layer_call(call.func):
                self._layer(call)
            elif call.name in _TABLES:
                self._table(call, *_TABLES[call.name])
            else:
                self._other(call)
        for leaf in leaves(self.values.tape.output):
            if isinstance(leaf, Ref) and key_of(leaf) in self.group:
                self._keep(key_of(leaf), "the model returns it")
        return self._merged()

    def _merged(self) -> Streams:
        merged = self._joined()
        while self._led_together(merged):
            merged = self._joined()
        sides = {side: self._root(number) for side, number in self.sides.items()}
        return Streams(
            merged,
            {-1 - key: self._root(number) for key, number in self.group.items() if key < 0},
            {key: number for (key, side), number in sides.items() if side == "in"},
            {key: number for (key, side), number in sides.items() if side == "out"},
            self.biases,
            self.norms,
            self._sums(),
            self.transposed,
        )

    def _joined(self) -> dict[int, Stream]:
        merged: dict[int, Stream] = {}
        for number, stream in enumerate(self.streams):
            into = merged.setdefault(self._root(number), Stream(stream.width))
            into.norms += stream.norms
            into.made += stream.made
            into.readers |= stream.readers
            into.writers |= stream.writers
            into.tables |= stream.tables
            into.values += stream.values
            into.whole = into.whole or stream.whole
        for stream in merged.values():
            stream.whole = stream.whole or _why_whole(stream)
        return merged

    def _led_together(self, merged: dict[int, Stream]) -> bool:
        """Join streams that no shortcut can lead between; whether there were any.

        A shortcut goes by what its norm reads, so that this must turn, and a norm that is used twice has one.
        What no norm reads behind a sum has the coordinates before it, unless it keeps those of the model.
        """
        targets: dict[int, int] = {}
        for found in self._sums():
            first, target = targets.setdefault(id(found.norm.weight), found.target), merged[found.target]
            led = merged[found.source].turns and (target.turns or target.whole)
            one = first if led else found.source
            if one != found.target:
                self._join(one, found.target)
                return True
        return False

    def _sums(self) -> list[Sum]:
        placed = [
            replace(found, source=self._root(found.source), target=self._root(found.target))
            for found in self.sums
        ]
        return [found for found in placed if found.source != found.target]

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            number = self.parents[number]
        return number

    def _new(self, leaf: Ref, width: int, axis: int) -> Stream:
        stream = Stream(width)
        self.parents.append(len(self.streams))
        self.streams.append(stream)
        self._put(leaf, len(self.streams) - 1, axis)
        return stream

    def _put(self, leaf: Ref, number: int, axis: int) -> None:
        self.group[key_of(leaf)], self.axis[key_of(leaf)] = number, axis
        self.streams[number].values.append(leaf.number)

    def _join(self, one: int, other: int) -> None:
        a, b = sorted((self._root(one), self._root(other)))
        self.parents[b] = a

    def _keep(self, key: int, reason: str) -> None:
        stream = self.streams[self.group[key]]
        stream.whole = stream.whole or reason

    def _side(self, tensor: Tensor, side: str, key: int) -> None:
        """A weight that is used twice reads, and writes, the same channels both times."""
        known = self.sides.setdefault((id(tensor), side), self.group[key])
        self._join(known, self.group[key])

    def _norm(self, norm: Norm) -> None:
        read, made = Ref(norm.reads), Ref(norm.makes)
        axis = self.values.at(read).dim() - 1
        if key_of(read) not in self.group:
            self._new(read, self.values.at(read).shape[-1], axis)
            self._keep(key_of(read), self.reasons.get(key_of(read), "it is made by no layer"))
        if self.axis[key_of(read)] == axis:
            self.streams[self.group[key_of(read)]].norms.append(norm)
            self._side(norm.weight, "in", key_of(read))
        else:
            self._keep(key_of(read), "a norm reads it along another axis than its channels")
        self._new(made, self.values.at(made).shape[-1], axis).made.append(norm)
        self._side(norm.weight, "out", key_of(made))

    def _layer(self, call: Call) -> None:
        x, weight, bias = (
            argument(call.args, call.kwargs, place, name)
            for place, name in enumerate(("input", "weight", "bias"))
        )
        (made,) = written(call)
        result, plain = self.values.at(made), isinstance(weight, Tensor) and call.name in _FORWARD
        writes, reads = reversed(_AXES) if call.func is transposed_linear else _AXES
        width = int(weight.shape[writes]) if plain else 0
        axis = result.dim() - 1 - (weight.dim() - 2) if plain else 0
        if not plain or result.shape[axis] != width:
            self._leave(call, f"it goes through {call.name} of no weight of its own")
            return
        self._new(made, width, axis).writers[id(weight)] = weight
        self._side(weight, "out", key_of(made))
        self.biases[id(weight)] = bias
        if call.func is transposed_linear:
            self.transposed.add(id(weight))
        if isinstance(x, Ref) and key_of(x) in self.group:
            if weight.shape[reads] != self.values.at(x).shape[self.axis[key_of(x)]]:
                self._keep(key_of(x), "a grouped layer reads it")
            elif self.axis[key_of(x)] != self.values.at(x).dim() - 1 - (weight.dim() - 2):
                self._keep(key_of(x), "a layer sums over another axis than its channels")
            else:
                self.streams[self.group[key_of(x)]].readers[id(weight)] = weight
                self._side(weight, "in", key_of(x))

    def _table(self, call: Call, place: int, name: str) -> None:
        weight = argument(call.args, call.kwargs, place, name)
        (made,) = written(call)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            self._other(call)
            return
        axis = self.values.at(made).dim() - 1
        self._new(made, int(weight.shape[1]), axis).tables[id(weight)] = (weight, 1)
        self._side(weight, "in", key_of(made))  # as a layer that is tied to it reads

    def _other(self, call: Call) -> None:
        """A call known by what it does alone: turning its channels before or after it must be the same."""
        read = operands(call)
        streams = [leaf for leaf in read if key_of(leaf) in self.group]
        constants = [leaf for leaf in read if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not streams and any(key_of(leaf) in self.reasons for leaf in read):
            self._leave(call, "")
        if not streams and (len(read) != 1 or not constants or constants[0].dim() < 2):
            return
        widths = {self.streams[self.group[key_of(leaf)]].width for leaf in streams} or {
            constants[0].shape[-1]
        }
        found = self._turned(call, streams, constants, widths.pop()) if len(widths) == 1 else None
        if found is None:
            self._leave(call, f"it goes through {call.name}, where channels meet")
            return
        axes, made = found
        led = self._led(call, streams, constants)
        numbers = [self.group[key_of(leaf)] for leaf in streams if leaf is not led]
        for leaf, axis in zip(written(call), made, strict=True):
            stream = self._new(leaf, self.values.at(leaf).shape[axis], axis)
            numbers.append(self.group[key_of(leaf)])
            stream.tables.update(
                {key: (tensor, axes[key]) for tensor in constants if (key := id(tensor)) in axes}
            )
        for number in numbers[1:]:
            self._join(numbers[0], number)
        if isinstance(led, Ref):
            norm = self.normed.pop(led.number)
            self.sums.append(Sum(norm, self.group[key_of(led)], numbers[-1]))

    def _led(
        self, call: Call, streams: Sequence[Ref | Tensor], constants: Sequence[Tensor]
    ) -> Ref | Tensor | None:
        """The summand that a norm reads, of a sum of two of which it does not read the other."""
        normed = [leaf for leaf in streams if isinstance(leaf, Ref) and leaf.number in self.normed]
        if call.name not in ADDITIONS or constants or len(streams) != _SUMMANDS or len(normed) != 1:
            return None
        return None if call.mutates and call.args[0] == normed[0] else normed[0]

    def _leave(self, call: Call, reason: str) -> None:
        """What a call reads keeps its coordinates; what it makes has none known; earlier reasons go on."""
        read = [key_of(leaf) for leaf in operands(call)]
        reason = next((self.reasons[key] for key in read if key in self.reasons), reason)
        for key in read:
            if key in self.group:
                self._keep(key, reason)
        self.reasons.update((key_of(leaf), reason) for leaf in written(call))

    def _turned(
        self, call: Call, streams: Sequence[Ref | Tensor], constants: Sequence[Tensor], width: int
    ) -> tuple[dict[int, int], list[int]] | None:
        """Axes of the channels in constants, by id, and in what the call makes, if it turns with them."""
        turn = self._turn(width)
        given = {
            key_of(leaf): _along(self.values.at(leaf), turn, self.axis[key_of(leaf)]) for leaf in streams
        }
        before = [self.values.at(leaf) for leaf in written(call)]
        for axes in _constant_axes(constants, width, needed=not streams):
            own = {id(c): _along(c.detach(), turn, axes[id(c)]) for c in constants if id(c) in axes}
            try:
                with torch.no_grad():
                    after = [
                        leaf
                        for leaf in tree_leaves(self.values.called(call, given | own))
                        if isinstance(leaf, Tensor)
                    ]
            except (RuntimeError, TypeError, ValueError, IndexError):
                return None
            made = [_axis_turned(y, z, turn) for y, z in zip(before, after, strict=False)]
            if made and len(before) == len(after) and all(axis is not None for axis in made):
                return axes, [axis for axis in made if axis is not None]
        return None

    def _turn(self, width: int) -> Tensor:
        if width not in self.turns:
            noise = torch.randn(
                width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width)
            )
            self.turns[width] = torch.linalg.qr(noise)[0]
        return self.turns[width]


def _why_whole(stream: Stream) -> str:
    if len({norm.centred for norm in stream.norms}) > 1:
        return "some of its norms subtract the mean and others do not"
    if any(norm.weight.shape[0] != stream.width for norm in stream.norms):
        return "a norm reads a part of its channels"
    return ""


def _along(x: Tensor, turn: Tensor, axis: int) -> Tensor:
    turned: Tensor = torch.tensordot(x.double(), turn, dims=([axis], [0]))
    return turned.movedim(-1, axis).to(x.dtype)


def _axis_turned(before: Tensor, after: Tensor, turn: Tensor) -> int | None:
    """The axis along which `after` is `before` turned."""
    before, after = before.detach(), after.detach()
    if before.shape != after.shape or not before.is_floating_point():
        return None
    share = max(_SAME, 8 * torch.finfo(before.dtype).eps)
    level = share * float(before.abs().max()) + 1e-12
    for axis in reversed(range(before.dim())):
        if before.shape[axis] == len(turn):
            gap = (_along(before, turn, axis).double() - after.double()).abs().max()
            if float(gap) <= level:
                return axis
    return None


def _constant_axes(constants: Sequence[Tensor], width: int, *, needed: bool) -> Iterator[dict[int, int]]:
    """Along which axes constants may hold channels, all of them first; with `needed` at least one does."""
    places = [
        [*(axis for axis in reversed(range(c.dim())) if c.shape[axis] == width), None] for c in constants
    ]
    for chosen in product(*places):
        axes = {id(c): axis for c, axis in zip(constants, chosen, strict=True) if axis is not None}
        if axes or not needed:
            yield axes
