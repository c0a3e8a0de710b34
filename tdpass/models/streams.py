"""What becomes of a model whose streams, or heads, are stored in other coordinates.

It has other weights, and norms that know what was left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class NewNorm:
    """The norm `adapter t + shift` with `t = c / sqrt(|c|^2 / reads + eps)`, c the first `reads` channels.

    `drops`: one channel lies behind these, the coordinate along the direction of the mean, which such a norm
    leaves out.  Without an adapter `[writes, reads]` it answers with t.  What it reads is added to through a
    `shortcut` `[to, from]` where the sum has other coordinates.
    """

    reads: int
    eps: float
    drops: bool
    adapter: Tensor | None = None
    shift: Tensor | None = None
    shortcut: Tensor | None = None


@dataclass(frozen=True)
class NewLayer:
    """Weight, `[o, i, *kernel]` or as the layer holds it, and bias of a layer."""

    weight: Tensor
    bias: Tensor | None


class HeadChange(Protocol):
    """What becomes of the heads of a layer, so that views of what it makes and reads must follow."""

    @property
    def made(self) -> bool:
        """Whether the layer makes them."""

    @property
    def read(self) -> bool:
        """Whether it reads them."""

    @property
    def values(self) -> bool:
        """Whether queries and keys stay as they are."""

    @property
    def kept(self) -> tuple[int, ...]:
        """The channels of a head that stay as they are, where others are left out; none otherwise."""

    @property
    def turned(self) -> Mapping[int, int]:
        """What sizes become that are those of what a rotary embedding turns of a head."""

    @property
    def sizes(self) -> Mapping[int, int]:
        """What sizes become that are those of a head, or of all of them together."""

    @property
    def counts(self) -> Mapping[int, int]:
        """What numbers of heads become."""

    def reshaped(self, shape: Sequence[int | None]) -> list[int | None] | None:
        """A shape into which heads are taken apart or joined, with one size changed; None for another.

        None stands for a size that is not known.
        """


@dataclass(frozen=True)
class HeadWidth:
    """How many channels each head of a layer had, and has: `rows` heads of its weight, and `columns`.

    They are `values` where queries and keys are as wide as before.  Where some of a head's channels are left
    out as they are, `kept` says which stay, and `turned` how many a rotary embedding turned, and turns.
    """

    before: int
    after: int
    rows: int
    columns: int
    values: bool = False
    kept: tuple[int, ...] = ()
    turned: Mapping[int, int] = field(default_factory=dict)

    @property
    def made(self) -> bool:
        return self.rows > 0

    @property
    def read(self) -> bool:
        return self.columns > 0

    @property
    def sizes(self) -> Mapping[int, int]:
        whole = {heads * self.before: heads * self.after for heads in (self.rows, self.columns) if heads}
        return {**whole, self.before: self.after}

    @property
    def counts(self) -> Mapping[int, int]:
        return {}

    def reshaped(self, shape: Sequence[int | None]) -> list[int | None] | None:
        for before, after in self.turned.items():  # pairs come apart as two channels each
            if list(shape[-2:]) == [before // 2, 2] and self.before not in shape[-2:]:
                return [*shape[:-2], after // 2, 2]
            if list(shape[-1:]) == [before] and before not in self.sizes:
                return [*shape[:-1], after]
        return _with_last(shape, self.sizes)  # a head's width comes last


@dataclass(frozen=True)
class HeadCount:
    """How many heads of so many channels layers have that had others: `counts` by number before.

    Keys and values may have fewer than queries.
    """

    width: int
    counts: Mapping[int, int]
    made: bool = False
    read: bool = False
    values: bool = False
    kept: tuple[int, ...] = ()
    turned: Mapping[int, int] = field(default_factory=dict)

    @property
    def sizes(self) -> Mapping[int, int]:
        return {before * self.width: after * self.width for before, after in self.counts.items()}

    def reshaped(self, shape: Sequence[int | None]) -> list[int | None] | None:
        for place in reversed(range(len(shape))):
            if shape[place] == self.width and (found := _with_last(shape[:place], self.counts)):
                return [*found, *shape[place:]]
        return _with_last(shape, self.sizes)


def _with_last(shape: Sequence[int | None], sizes: Mapping[int, int]) -> list[int | None] | None:
    """The shape with the last place that holds one of these sizes changed."""
    found = list(shape)
    for place in reversed(range(len(shape))):
        size = shape[place]
        if size is not None and size in sizes:
            found[place] = sizes[size]
            return found
    return None


@dataclass
class StreamEdits:
    """What changes, by the tensor of the model that is held there.

    These are layers by their weight, norms by theirs, tables and other constants.  `heads` are layers whose
    heads have another width, so that views of what they make and read must follow.  `held` are the tensors
    as a recorded run names them, by the keys of the others.
    """

    held: dict[int, Tensor] = field(default_factory=dict)
    layers: dict[int, NewLayer] = field(default_factory=dict)
    norms: dict[int, NewNorm] = field(default_factory=dict)
    tables: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, HeadChange] = field(default_factory=dict)
