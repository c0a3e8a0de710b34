"""Channels that calls mix among themselves before heads meet, as rotary embeddings do with pairs of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.planner.streams.values import written
from tdpass.tape import CHANNELWISE, Call, Ref
from tdpass.tape.calls import argument
from tdpass.tape.slices import moved

_PLACEWISE = CHANNELWISE | frozenset(
    {
        "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__",
        "div", "__truediv__", "true_divide", "neg", "__neg__", "pow", "__pow__", "square", "sqrt", "rsqrt",
        "reciprocal", "to", "float", "half", "bfloat16", "double", "type_as", "_to_copy", "clone",
    }
)  # fmt: skip
_JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
_NORMS = frozenset({"rms_norm", "layer_norm"})
_PAIRS, _APART, _MEAN = "view_as_complex", "view_as_real", "mean"


@dataclass
class Mixing:
    """Sets of channels of one layer that have met each other.

    Every number of a value depends on the set of the channel that it is marked with, and on no other.
    """

    _parents: dict[int, int] = field(default_factory=dict)

    def root(self, channel: int) -> int:
        """The channel that stands for all of a set."""
        while channel in self._parents:
            channel = self._parents[channel]
        return channel

    def met(self, channels: Iterable[int], width: int) -> list[int]:
        """All channels that met one of these, among the first `width`."""
        roots = set(map(self.root, channels))
        return [channel for channel in range(width) if self.root(channel) in roots]

    def sets(self, start: int, width: int) -> list[tuple[int, ...]]:
        """The sets that `width` channels from one on are made of, counted from there."""
        found = dict[int, list[int]]()
        for at in range(width):
            found.setdefault(self.root(start + at), []).append(at)
        return [tuple(each) for each in found.values()]

    def through(self, call: Call, marks: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> Tensor | None:
        """The marks of what a call makes, or None where that is not known.

        `marks` are the channels of what it reads of the layer, `values` all that it reads and makes.
        """
        (made,) = written(call)[:1]
        shape, given = values[made.number].shape, list(marks.values())
        if len(written(call)) != 1 or call.mutates:
            return None
        if call.name in _JOINS:
            return _joined(call, marks, made.number)
        if call.name == _PAIRS:
            return self._merged(given[0])[..., 0]
        if call.name == _APART:
            return given[0][..., None].expand(shape)
        if call.name == _MEAN:
            return self._averaged(call, given[0])
        if call.name in _NORMS:
            widths = argument(call.args, call.kwargs, 1, "normalized_shape")
            return self._merged(given[0]) if len(widths) == 1 else None
        return self._placed(given, shape) if call.name in _PLACEWISE else None

    def heads(self, channels: Tensor, axis: int, width: int) -> Tensor | None:
        """The first channel of every head, over all axes but channels and positions.

        None where what lies along that axis is not made of as many channels in a row, and of no others.
        """
        lines = channels.movedim(axis, -1)
        unique, inverse = torch.unique(lines.reshape(-1, lines.shape[-1]), dim=0, return_inverse=True)
        firsts = [self._first(line, width) for line in unique.tolist()]
        if None in firsts:
            return None
        found = torch.tensor(firsts, dtype=channels.dtype)[inverse].reshape(lines.shape[:-1])
        return found[..., 0] if bool((found == found[..., :1]).all()) else None

    def _first(self, line: Sequence[int], width: int) -> int | None:
        channels = self.met(line, width)
        whole = len(channels) == len(line) == channels[-1] - channels[0] + 1
        return channels[0] if whole else None

    def _placed(self, given: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Numbers at the same place meet."""
        first, *others = (channels.broadcast_to(shape) for channels in given)
        for other in others:
            for one, two in set(zip(*_once(first, other), strict=True)):
                self._meet(one, two)
        return first

    def _merged(self, channels: Tensor) -> Tensor:
        """Numbers along the last axis meet."""
        for line in torch.unique(channels.reshape(-1, channels.shape[-1]), dim=0).tolist():
            for other in line[1:]:
                self._meet(line[0], other)
        return channels

    def _averaged(self, call: Call, channels: Tensor) -> Tensor | None:
        axes = argument(call.args, call.kwargs, 1, "dim")
        kept = argument(call.args, call.kwargs, 2, "keepdim")
        last = axes in (-1, channels.dim() - 1, [-1], (-1,), [channels.dim() - 1])
        return self._merged(channels)[..., :1] if last and kept else None

    def _meet(self, one: int, two: int) -> None:
        one, two = sorted((self.root(one), self.root(two)))
        if one != two:
            self._parents[two] = one


def _once(*given: Tensor) -> list[list[int]]:
    """All numbers of tensors of one shape, without axes along which none of them differs."""
    alike = zip(*(channels.stride() for channels in given), strict=True)
    at = tuple(slice(0, 1) if not any(strides) else slice(None) for strides in alike)
    return [channels[at].flatten().tolist() for channels in given]


def _joined(call: Call, marks: Mapping[int, Tensor], made: int) -> Tensor | None:
    """What is joined is all of the layer."""
    (parts,) = call.args[:1]
    if not all(isinstance(part, Ref) and part.number in marks for part in parts):
        return None
    into = dict[int, Tensor]()
    moved(call, dict(marks), into)
    return into[made]
