"""Tables that the angles of rotary embeddings are computed from: which number of them turns which channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.planner.streams.values import Values, key_of
from tdpass.tape import Call, Ref, Tape, leaves

Sets = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Turning:
    """What the channels of a site meet in a call: a value or tensor, in the shape of what the call makes.

    `channels` are those of the layer that lie there.
    """

    site: str
    operand: Ref | Tensor
    channels: Tensor


@dataclass(frozen=True)
class Table:
    """A tensor of the model along whose `axis` every number is one for a set of channels, and where that is.

    `sets` holds the place of the set among those of a head, -1 for numbers that turn nothing.
    """

    tensor: Tensor
    axis: int
    sets: tuple[int, ...]
    sites: frozenset[str]

    def kept(self, places: Sequence[int]) -> Tensor:
        """The table for heads that keep the sets at these places."""
        at = [number for number, place in enumerate(self.sets) if place in places or place < 0]
        return self.tensor.detach().index_select(self.axis, torch.tensor(at, device=self.tensor.device))


@dataclass
class Angles:
    """The tables behind what turns channels in a run; `places` gives the set of every channel, by site."""

    tape: Tape
    places: Mapping[str, Mapping[int, int]]
    makers: dict[int, Call] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.makers = {number: call for call in self.tape.calls for number in call.writes()}

    def tables(self, turnings: Sequence[Turning]) -> tuple[list[Table], set[str]]:
        """The tables, and the sites of which some channels are turned by what comes from none.

        Found by putting in turn a NaN in every place along an axis: what it reaches, the place turns.
        """
        known = [turning for turning in turnings if turning.site in self.places]
        calls = self._behind(known)
        if any(call.site is not None for call in calls):
            return [], {turning.site for turning in known}
        values = Values(self.tape, dict(self.tape.inputs))
        with torch.no_grad():
            for call in calls:
                _keep(values, call, {})
        found = [
            table
            for tensor in _constants(calls, known)
            if (table := self._table(tensor, calls, known, values)) is not None
        ]
        return found, self._uncovered(found, known)

    def _behind(self, turnings: Sequence[Turning]) -> list[Call]:
        """All calls that what turns comes from, in the order of the run."""
        ahead = [turning.operand.number for turning in turnings if isinstance(turning.operand, Ref)]
        seen = dict[int, Call]()
        while ahead:
            call = self.makers.get(ahead.pop())
            if call is not None and id(call) not in seen:
                seen[id(call)] = call
                ahead += call.reads()
        return [call for call in self.tape.calls if id(call) in seen]

    def _table(
        self, tensor: Tensor, calls: Sequence[Call], turnings: Sequence[Turning], values: Values
    ) -> Table | None:
        dependent = _dependent(tensor, calls)
        reached = {id(tensor), *(-1 - number for call in dependent for number in call.writes())}
        own = [turning for turning in turnings if key_of(turning.operand) in reached]
        for axis in reversed(range(tensor.dim() if own else 0)):
            sets = list[int]()
            for at in range(tensor.shape[axis]):
                place = self._turned_by(tensor, axis, at, dependent, own, values)
                if place is None:
                    break
                sets.append(place)
            if len(sets) == tensor.shape[axis] and max(sets) >= 0:
                return Table(tensor, axis, tuple(sets), frozenset(turning.site for turning in own))
        return None

    def _turned_by(
        self,
        tensor: Tensor,
        axis: int,
        at: int,
        calls: Sequence[Call],
        turnings: Sequence[Turning],
        values: Values,
    ) -> int | None:
        """The place of the one set that a number along an axis turns, -1 for none; None for several."""
        marked = tensor.detach().clone()
        marked.select(axis, at).fill_(float("nan"))
        others = {id(tensor): marked}
        with torch.no_grad():
            for call in calls:
                _keep(values, call, others)
        found = set[int]()
        for turning in turnings:
            reached = others.get(key_of(turning.operand))
            if reached is not None:
                channels = _met(reached, turning.channels)
                found.update(self.places[turning.site].get(channel, -2) for channel in channels)
        if not found:
            return -1
        return found.pop() if len(found) == 1 and -2 not in found else None

    def _uncovered(self, tables: Sequence[Table], turnings: Sequence[Turning]) -> set[str]:
        """Sites whose heads meet numbers that differ among channels and come from no table."""
        told = {id(table.tensor) for table in tables}
        missing = set[str]()
        for turning in turnings:
            behind = self._behind([turning])
            constants = [turning.operand] if isinstance(turning.operand, Tensor) else []
            read = {id(tensor) for tensor in (*constants, *_constants(behind, []))}
            if not read & told:
                missing.add(turning.site)
        return missing


def _keep(values: Values, call: Call, others: dict[int, Tensor]) -> None:
    """Repeat a call; with `others`, which takes up what it makes, beside the run as it was."""
    result = values.called(call, others)
    for ref, value in zip(leaves(call.output), leaves(result), strict=True):
        if isinstance(ref, Ref):
            if others:
                others[key_of(ref)] = value
            else:
                values.by_number[ref.number] = value


def _dependent(tensor: Tensor, calls: Sequence[Call]) -> list[Call]:
    """The calls that what they read of a tensor reaches."""
    reached, found = {id(tensor)}, list[Call]()
    for call in calls:
        read = leaves((call.args, dict(call.kwargs)))
        if any(key_of(leaf) in reached for leaf in read if isinstance(leaf, Ref | Tensor)):
            found.append(call)
            reached.update(-1 - number for number in call.writes())
    return found


def _constants(calls: Sequence[Call], turnings: Sequence[Turning]) -> Iterator[Tensor]:
    """Tensors of the model that calls and turnings read, each once, that may hold angles."""
    read = [leaf for call in calls for leaf in leaves((call.args, dict(call.kwargs)))]
    found = {id(leaf): leaf for leaf in (*read, *(turning.operand for turning in turnings))}
    for leaf in found.values():
        if isinstance(leaf, Tensor) and leaf.numel() > 1 and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf


def _met(value: Tensor, channels: Tensor) -> list[int]:
    """The channels that NaN in a value meet, over axes along which channels differ."""
    hit = torch.isnan(value)
    hit = hit.reshape((1,) * (channels.dim() - hit.dim()) + tuple(hit.shape))
    alike = [axis for axis, stride in enumerate(channels.stride()) if not stride]
    for axis in alike:
        hit = hit.any(axis, keepdim=True)
        channels = channels.narrow(axis, 0, 1)
    met: list[int] = torch.unique(channels[hit.expand_as(channels)]).tolist()
    return met
