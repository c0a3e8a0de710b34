"""Streams as they are found: who reads and writes each, and sums that lead from one to the next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tdpass.planner.streams.norms import Norm


@dataclass
class Stream:
    """Values whose channels are those of each other, `width` of them.

    `norms` read it, `made` are the norms that write to it; layers read and write it by their weights, tables
    and other constants hold their part of it along an axis.  `whole` says why its coordinates must stay.
    """

    width: int
    norms: list[Norm] = field(default_factory=list)
    made: list[Norm] = field(default_factory=list)
    readers: dict[int, Tensor] = field(default_factory=dict)
    writers: dict[int, Tensor] = field(default_factory=dict)
    tables: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    values: list[int] = field(default_factory=list)
    whole: str = ""

    @property
    def turns(self) -> bool:
        """Whether it may have other coordinates: something that minds none but lengths reads it."""
        return bool(self.norms) and not self.whole

    @property
    def passes(self) -> bool:
        """Whether what a norm makes is read by layers alone, which then take up what the norm does not do."""
        only = self.made and not (self.writers or self.tables or self.norms)
        return bool(only) and not self.whole and len({id(norm.weight) for norm in self.made}) == 1

    @property
    def centred(self) -> bool:
        """Whether its norms subtract the mean."""
        return any(norm.centred for norm in self.norms)


@dataclass(frozen=True)
class Sum:
    """A residual sum whose result is of another stream than the summand that a norm reads.

    That summand goes through a shortcut from the coordinates of the one to those of the other.
    """

    norm: Norm
    source: int
    target: int


@dataclass
class Streams:
    """The streams of a run by number, and which of them values are of, and weights read and write.

    Values are given by their number, weights by their id. `biases` are those of layers, by the id of the
    weight. `sums` lead from one stream to the next, `transposed` are weights that are held as `[i, o]`.
    """

    streams: dict[int, Stream]
    value: dict[int, int]
    reads: dict[int, int]
    writes: dict[int, int]
    biases: dict[int, Tensor | None]
    norms: Sequence[Norm]
    sums: Sequence[Sum] = ()
    transposed: Collection[int] = frozenset()

    def keep_mean(self) -> set[int]:
        """The streams whose mean over channels something reads: layers, or what a sum leads to.

        Norms that subtract it do not.
        """
        found = {number for number, stream in self.streams.items() if stream.readers or not stream.turns}
        while more := {sum_.source for sum_ in self.sums if sum_.target in found} - found:
            found |= more
        return found

    def turning(self) -> list[int]:
        """The streams whose coordinates may be others."""
        return [number for number, stream in self.streams.items() if stream.turns]

    def reasons(self) -> list[str]:
        """Why values that norms read keep their coordinates."""
        return sorted(
            {
                f"{stream.width} channels: {stream.whole}"
                for stream in self.streams.values()
                if stream.norms and stream.whole
            }
        )
