"""Which channels of layers meet in the products of attention, by what a run does with each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tdpass.planner.heads.angles import Angles, Sets, Table, Turning
from tdpass.planner.heads.bonds import Bond, Bonds, Side
from tdpass.planner.heads.mixing import Mixing
from tdpass.planner.streams.values import Values, key_of, operands, written
from tdpass.tape import Call, Ref, Tape
from tdpass.tape.calls import argument
from tdpass.tape.slices import MOVES, moved

_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm"})
_FUSED = "scaled_dot_product_attention"
_OPERANDS = ("query", "key", "value")
_SCALES = frozenset({"mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide"})


@dataclass(frozen=True)
class _Marks:
    """Of which channel of a site every number of a value is.

    Where channels are `turned`, it stands for all that met it.  `attended` is the width of heads once
    attention summed over positions, 0 before, and `scores` the place of the bond whose scores weighed these.
    """

    site: str
    channels: Tensor
    attended: int = 0
    scores: int | None = None
    turned: str = ""


def find_bonds(tape: Tape) -> Bonds:
    """The bonds of a recorded run, which is repeated once where there is a product in it."""
    if not any(call.name in _PRODUCTS or call.name == _FUSED for call in tape.calls):
        return Bonds((), {}, {})
    return _Finder(Values(tape, dict(tape.inputs))).found()


@dataclass
class _Finder:
    values: Values
    marks: dict[int, _Marks] = field(default_factory=dict)
    spoiled: dict[str, dict[int, str]] = field(default_factory=dict)
    mixing: dict[str, Mixing] = field(default_factory=dict)
    layers: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    bonds: list[Bond] = field(default_factory=list)
    apart: dict[str, str] = field(default_factory=dict)
    scored: dict[int, int] = field(default_factory=dict)
    weighed: list[tuple[int, int]] = field(default_factory=list)
    turnings: list[Turning] = field(default_factory=list)

    def found(self) -> Bonds:
        tape = self.values.tape
        for call in self.values.steps(forget=True):
            self._call(call)
        for number, marks in self.marks.items():
            if tape.is_output(number):
                self._spoil(marks, "the model returns it")
        whys = [(bond, self._why_not(bond)) for bond in self.bonds]
        reasons = {bond.left.site: why or bond.turned for bond, why in whys if why or bond.turned}
        whole = [bond for bond, why in whys if not why]
        pairs = [(self.bonds[one], self.bonds[other]) for one, other in self.weighed]
        attentions = tuple(pair for pair in pairs if all(bond in whole for bond in pair))
        found = tuple(bond for bond in whole if not bond.turned)
        turned, tables = self._by_tables([bond for bond in whole if bond.sets])
        said = {**self.apart, **reasons}
        for site in {side.site for bond in turned for side in (bond.left, bond.right)}:
            said.pop(site, None)
        return Bonds(found, self.layers, said, attentions, turned, tables)

    def _by_tables(self, bonds: Sequence[Bond]) -> tuple[tuple[Bond, ...], tuple[Table, ...]]:
        """The bonds all of whose angles are computed from tables, and these."""
        places = dict[str, dict[int, int]]()
        for bond in bonds:
            within = {channel: place for place, each in enumerate(bond.sets) for channel in each}
            for side in (bond.left, bond.right):
                channels = ((start, at) for start in side.starts for at in within)
                places[side.site] = {start + at: within[at] for start, at in channels}
        tables, without = Angles(self.values.tape, places).tables(self.turnings)
        known = places.keys() - without
        while True:
            kept = [bond for bond in bonds if {bond.left.site, bond.right.site} <= known]
            sites = {side.site for bond in kept for side in (bond.left, bond.right)}
            shared = [table for table in tables if table.sites & sites]
            mixed = {site for table in shared if not table.sites <= sites for site in table.sites}
            if not mixed & sites:
                return tuple(kept), tuple(shared)
            known -= mixed

    def _why_not(self, bond: Bond) -> str:
        for side in (bond.left, bond.right):
            if len(self.values.tape.site_calls[side.site]) != 1:
                return f"{side.site} is called several times"
            spoiled = {} if side.reads else self.spoiled.get(side.site, {})
            channels = (start + at for start in side.starts for at in range(bond.width))
            why = next((spoiled[channel] for channel in channels if channel in spoiled), "")
            if why:
                return why
        return ""

    def _spoil(self, marks: _Marks, reason: str) -> None:
        """The channels of a value stay as they are; said where they lie in heads."""
        if self._in_heads(marks):
            self.apart.setdefault(marks.site, reason)
        spoiled, channels = self.spoiled.setdefault(marks.site, {}), torch.unique(marks.channels).tolist()
        for channel in self._mixing(marks.site).met(channels, self._width(marks.site)):
            spoiled.setdefault(channel, reason)

    def _in_heads(self, marks: _Marks) -> bool:
        return marks.channels.shape[-1] < self._width(marks.site)

    def _width(self, site: str) -> int:
        return self.layers[site][0].shape[0]

    def _mixing(self, site: str) -> Mixing:
        return self.mixing.setdefault(site, Mixing())

    def _call(self, call: Call) -> None:
        marked = [number for number in dict.fromkeys(call.reads()) if number in self.marks]
        if call.site is not None:
            self._layer(call, marked)
        elif call.name in _PRODUCTS and marked and len(call.args) > 1:
            self._product(call, *call.args[:2])
        elif call.name == _FUSED and marked:
            q, k, v = (argument(call.args, call.kwargs, at, name) for at, name in enumerate(_OPERANDS))
            self._scores(call, q, k, -1)
            self._attended(call, v, call)
        elif len(marked) == 1 and not call.mutates and self._keeps(call):
            self._move(call, marked[0])
        elif not self._turn(call, marked):
            for number in marked:
                self._spoil(self.marks[number], _differing(call))
            self._pass_on(call)

    def _turn(self, call: Call, marked: list[int]) -> bool:
        """Whether a call is known to mix channels of heads of one layer, which then are turned."""
        read = {number: self.marks[number] for number in marked}
        if len({marks.site for marks in read.values()}) != 1:
            return False
        if not all(self._in_heads(marks) and not marks.attended for marks in read.values()):
            return False
        first, *_ = read.values()
        given = {number: marks.channels for number, marks in read.items()}
        channels = self._mixing(first.site).through(call, given, self.values.by_number)
        if channels is None:
            return False
        self.turnings += [
            Turning(first.site, leaf, channels)
            for leaf in operands(call)
            if key_of(leaf) not in {key_of(Ref(number)) for number in marked}
            and self.values.at(leaf).numel() > 1
        ]
        why = next((marks.turned for marks in read.values() if marks.turned), _differing(call))
        self.apart.setdefault(first.site, why)
        self.marks[next(call.writes())] = replace(first, channels=channels, turned=why)
        return True

    def _pass_on(self, call: Call) -> None:
        """What is made of scores are still those of a bond."""
        places = {self.scored[number] for number in call.reads() if number in self.scored}
        if len(places) == 1:
            self.scored.update(dict.fromkeys(call.writes(), places.pop()))

    def _keeps(self, call: Call) -> bool:
        """Whether a call only moves what it reads, or multiplies all of it by one number."""
        others = [
            leaf for leaf in operands(call) if not isinstance(leaf, Ref) or leaf.number not in self.marks
        ]
        scales = call.name in _SCALES and all(self.values.at(leaf).numel() == 1 for leaf in others)
        return call.name in MOVES or scales

    def _move(self, call: Call, number: int) -> None:
        marks = self.marks[number]
        if call.name in _SCALES:
            into = dict.fromkeys(call.writes(), marks.channels)
        else:
            into = dict[int, Tensor]()
            moved(call, {**self.values.by_number, number: marks.channels}, into)
        self.marks |= {written: replace(marks, channels=channels) for written, channels in into.items()}

    def _layer(self, call: Call, marked: list[int]) -> None:
        weight = argument(call.args, call.kwargs, 1, "weight")
        plain = call.name == "linear" and isinstance(weight, Tensor) and call.site is not None
        for number in marked:
            marks = self.marks[number]
            if not plain or not marks.attended:
                self._spoil(marks, "a layer reads it before any product of attention")
            elif not self._read(str(call.site), marks):
                self._spoil(marks, f"{call.site} reads it with the channels of heads apart")
        if not plain:
            return
        self.layers[str(call.site)] = (weight, argument(call.args, call.kwargs, 2, "bias"))
        (made,) = written(call)
        shape = self.values.at(made).shape
        self.marks[made.number] = _Marks(
            str(call.site), torch.arange(shape[-1], dtype=torch.int32).expand(shape)
        )

    def _read(self, site: str, marks: _Marks) -> bool:
        """Whether a layer reads whole heads one after the other, which then are a bond."""
        columns = marks.channels.reshape(-1, marks.channels.shape[-1])
        width = marks.attended
        if not bool((columns == columns[:1]).all()) or columns.shape[1] % width:
            return False
        starts = _starts(columns[:1].reshape(-1, width)[:, None, :], -1)
        if starts is None:
            return False
        pairs = {(int(start), head * width) for head, start in enumerate(starts)}
        if marks.scores is not None:
            self.weighed.append((marks.scores, len(self.bonds)))
        self._bond(marks.site, site, pairs, width, scores=False)
        return True

    def _product(self, call: Call, a: object, b: object) -> None:
        both = [leaf for leaf in (a, b) if isinstance(leaf, Ref) and leaf.number in self.marks]
        if len(both) == len((a, b)):
            self._scores(call, a, b, -2)
        elif both == [b]:
            self._attended(call, b, a)
        else:
            self._spoil(self.marks[both[0].number], "it is multiplied by what is no layer's output")

    def _scores(self, call: Call, q: object, k: object, axis: int) -> None:
        """Queries meet keys, whose channels lie along that axis."""
        sides = [self.marks.get(leaf.number) for leaf in (q, k) if isinstance(leaf, Ref)]
        known = [marks for marks in sides if marks is not None]
        found = [self._heads(marks, at) for marks, at in zip(known, (-1, axis), strict=False)]
        whole = [starts for starts in found if starts is not None]
        if len(whole) != len((q, k)) or any(marks.attended for marks in known):
            for marks in known:
                self._spoil(marks, f"it meets in {call.name} what is no layer's output")
            return
        left, right = whole[0], _repeated(whole[1], whole[0])
        left, right = left + torch.zeros_like(right), right + torch.zeros_like(left)
        pairs = set(zip(left.flatten().tolist(), right.flatten().tolist(), strict=True))
        self.scored.update(dict.fromkeys(call.writes(), len(self.bonds)))
        turned = known[0].turned or known[1].turned
        width = known[0].channels.shape[-1]
        self._bond(known[0].site, known[1].site, pairs, width, scores=True, turned=turned)

    def _sets(self, sides: Sequence[Side], width: int) -> Sets:
        """The sets of channels that meet in every head of both sides alike; none where they are all one."""
        found = {tuple(self._mixing(side.site).sets(start, width)) for side in sides for start in side.starts}
        (sets, *others) = found
        return () if others or len(sets) == 1 else sets

    def _heads(self, marks: _Marks, axis: int) -> Tensor | None:
        if not marks.turned:
            return _starts(marks.channels, axis)
        return self._mixing(marks.site).heads(marks.channels, axis, self._width(marks.site))

    def _attended(self, call: Call, v: object, weights: object) -> None:
        """What weighs values are scores, made by the very call or read by it."""
        marks = self.marks.get(v.number) if isinstance(v, Ref) else None
        if marks is None:
            return
        starts = None if marks.turned or marks.attended else _starts(marks.channels, -1)
        if starts is None:
            self._spoil(marks, f"{call.name} reads it with the channels of heads apart")
            return
        (made,), width = written(call)[:1], marks.channels.shape[-1]
        shape = self.values.at(made).shape
        starts = _repeated(starts, torch.empty(shape[:-2]))
        channels = starts[..., None, None] + torch.arange(width, dtype=torch.int32)
        scores = made if weights is call else weights
        place = self.scored.get(scores.number) if isinstance(scores, Ref) else None
        self.marks[made.number] = _Marks(marks.site, channels.expand(shape), width, place)

    def _bond(
        self,
        left: str,
        right: str,
        pairs: set[tuple[int, int]],
        width: int,
        *,
        scores: bool,
        turned: str = "",
    ) -> None:
        groups: list[tuple[set[int], set[int]]] = []
        for one, other in sorted(pairs):
            met = [group for group in groups if one in group[0] or other in group[1]]
            groups = [group for group in groups if group not in met]
            groups.append(
                ({one}.union(*(group[0] for group in met)), {other}.union(*(group[1] for group in met)))
            )
        ordered = tuple((tuple(sorted(a)), tuple(sorted(b))) for a, b in groups)
        sides = [tuple(sorted({pair[at] for pair in pairs})) for at in (0, 1)]
        both = (Side(left, False, sides[0]), Side(right, not scores, sides[1]))
        sets = self._sets(both, width) if turned else ()
        self.bonds.append(Bond(*both, width, scores, ordered, turned, sets))


def _differing(call: Call) -> str:
    return f"its output goes through {call.name}, where channels differ"


def _starts(channels: Tensor, axis: int) -> Tensor | None:
    """The first channel of every head, over all axes but channels and positions; None for no heads."""
    if channels.dim() < -axis or channels.dim() == 1:
        return None
    lines = channels.movedim(axis, -1)
    first = lines[..., :1, :1]
    whole = bool((lines == first + torch.arange(lines.shape[-1], dtype=lines.dtype)).all())
    return first[..., 0, 0] if whole else None


def _repeated(starts: Tensor, like: Tensor) -> Tensor:
    """Those of grouped queries: each key and value serves as many heads in turn as there are more queries."""
    times = like.shape[-1] // max(1, starts.shape[-1]) if like.dim() and starts.dim() == like.dim() else 1
    return starts.repeat_interleave(times, -1) if times > 1 else starts
