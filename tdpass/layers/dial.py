"""The settings of an adaptive model, what they mean for its layers, and the switch that chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from tdpass.documents import Count, Positive, Size


@dataclass(frozen=True)
class Cut:
    """The channels that are in use: so many from the first."""

    first: Count
    count: Size

    def of(self, tensor: Tensor, axis: int = 0) -> Tensor:
        """That part of a tensor, as a view."""
        return tensor.narrow(axis, self.first, self.count)


@dataclass(frozen=True)
class AdaptiveForm:
    """One layer: its format, its rank at width and share 1, and its channels.

    The rank is 0 for dense; the channels are those that it reads and makes at each width.
    """

    format: str
    rank: Count
    inputs: tuple[Cut, ...]
    outputs: tuple[Cut, ...]

    @property
    def shrinks(self) -> bool:
        """Whether it has fewer channels at some width."""
        return len(set(self.inputs)) > 1 or len(set(self.outputs)) > 1


@dataclass(frozen=True)
class Adaptation:
    """The widths and rank shares that a model runs at, in rising order, and what they mean for its parts.

    Its parts are layers and batch-norms. Where there are `bits`, in rising order, its weights are integers of
    the most, of which the upper ones are in use.
    """

    widths: tuple[Positive, ...]
    ranks: tuple[Positive, ...]
    layers: Mapping[str, AdaptiveForm]
    norms: Mapping[str, tuple[Cut, ...]]
    bits: tuple[Size, ...] = ()


class Dial:
    """The width and rank share that a model runs at, by their places, and its bits.

    Bits are 0 for floating-point numbers. Its adaptive layers share one dial.
    """

    def __init__(self, adaptation: Adaptation) -> None:
        self.adaptation = adaptation
        self.width, self.rank = len(adaptation.widths) - 1, len(adaptation.ranks) - 1
        self.bits = max(adaptation.bits, default=0)

    @property
    def place(self) -> int:
        """The number of the setting."""
        return self.width * len(self.adaptation.ranks) + self.rank

    @property
    def places(self) -> int:
        """How many settings there are, bits apart; the last is the whole model."""
        return len(self.adaptation.widths) * len(self.adaptation.ranks)

    def turn(self, place: int) -> None:
        """Run at the setting of that number."""
        self.width, self.rank = divmod(place, len(self.adaptation.ranks))

    @contextmanager
    def in_bits(self, bits: int) -> Iterator[None]:
        """Run with so many bits for a while."""
        before, self.bits = self.bits, bits
        try:
            yield
        finally:
            self.bits = before

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """Run at the setting of that number for a while."""
        before = self.place
        self.turn(place)
        try:
            yield
        finally:
            self.turn(before)
