"""Which slices of a layer's output a run reads apart: query, key and value of one linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tdpass.tape.calls import Call, Ref, leaves, mapped
from tdpass.tape.playback import Tape

MOVES = frozenset(
    {
        "reshape", "view", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "moveaxis",
        "swapaxes", "swapdims",
        "squeeze", "unsqueeze", "contiguous", "split", "split_with_sizes", "tensor_split", "chunk", "unbind",
        "narrow", "select", "slice",
        "index_select", "__getitem__", "expand", "broadcast_to", "repeat_interleave",
    }
)  # fmt: skip
_ON_INDICES = MOVES | {"remainder"}
_SMALL = 4096  # numbers in a constant that may be an index
FEWEST, MOST = 8, 8


def slices_read(tape: Tape, site: str) -> tuple[int, ...]:
    """Sizes of the slices along the last axis of a site's output that the run reads apart, in order.

    They are those that its readers see once the output was only cut, reshaped and permuted; empty where a
    reader sees all of it, slices overlap or leave something out, one has fewer than `FEWEST` channels, there
    are more than `MOST`, or the site is called more than once: every call of a recurrent layer would become
    several.
    """
    places = tape.site_calls.get(site, [])
    return _of_call(tape, places[0]) if len(places) == 1 else ()


def _of_call(tape: Tape, place: int) -> tuple[int, ...]:
    shape = tape.calls[place].shapes[1]
    (number,) = tape.calls[place].writes()
    marks = {number: torch.arange(shape[-1], dtype=torch.int32).expand(shape).contiguous()}
    spans: set[tuple[int, int]] = set()
    for seen in _seen(tape, place, marks):
        channels = torch.unique(seen)
        start, stop = int(channels[0]), int(channels[-1]) + 1
        if channels.numel() != stop - start or stop - start == shape[-1]:
            return ()
        spans.add((start, stop))
    ordered = sorted(spans)
    borders = [0, *(stop for _, stop in ordered)]
    sizes = tuple(stop - start for start, stop in ordered)
    whole = borders[-1] == shape[-1] and [start for start, _ in ordered] == borders[:-1]
    return sizes if whole and len(sizes) <= MOST and min(sizes) >= FEWEST else ()


def _seen(tape: Tape, place: int, marks: dict[int, Tensor]) -> Iterator[Tensor]:
    """The channels that each reader sees; `marks` holds those of the values that only moved since."""
    indices: dict[int, Tensor] = {}
    for call in tape.calls[place + 1 :]:
        reads = set(call.reads())
        marked = reads & marks.keys()
        known = reads <= (marks.keys() | indices.keys()) and not call.mutates
        if known and len(marked) == 1 and call.operator in MOVES:
            moved(call, {**marks, **indices}, marks)
        elif marked:
            yield from (marks[number] for number in marked)
        elif known and call.operator in _ON_INDICES and _constants(call) <= _SMALL:
            moved(call, indices, indices)
    yield from (mark for number, mark in marks.items() if tape.is_output(number))


def moved(call: Call, values: dict[int, Tensor], into: dict[int, Tensor]) -> None:
    """Make the call on these values, and put what comes of it, by number, into `into`."""
    args, kwargs = mapped(
        lambda leaf: values[leaf.number] if isinstance(leaf, Ref) else leaf, (call.args, dict(call.kwargs))
    )
    made: Any = call.func(*args, **kwargs)
    for number, value in zip(leaves(call.output), tree_leaves(made), strict=True):
        if isinstance(number, Ref):
            into[number.number] = value


def _constants(call: Call) -> int:
    return sum(leaf.numel() for leaf in leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor))
