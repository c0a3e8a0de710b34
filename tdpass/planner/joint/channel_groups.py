"""Channel groups: the axes of channels in a model that must shrink together, from a recorded run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tdpass.planner.joint.paths import POOLS
from tdpass.site import Site
from tdpass.tape import CHANNELWISE, Call, Ref, Tape, leaves

_PASSES = (
    CHANNELWISE
    | POOLS
    | frozenset({"softplus", "dropout2d", "contiguous", "to", "float", "mean", "interpolate"})
)
_PASSES |= frozenset({"view", "reshape", "__getitem__"})  # where they touch channels, the group is not proved
_JOINS = frozenset(
    {
        "add",
        "__add__",
        "__radd__",
        "add_",
        "__iadd__",
        "sub",
        "__sub__",
        "mul",
        "__mul__",
        "__rmul__",
        "mul_",
        "__imul__",
    }
)
_NORM, _PAD = "batch_norm", "pad"


@dataclass
class ChannelGroups:
    """Which values of a run have the same channels.

    `reads` and `makes` name by site the group that its layer reads and makes, `norms` by id of the running
    mean the one that a batch-norm is on.  `whole` says of a group why all of its channels stay, and
    `channels` how many it has.  Sums, products and batch-norms join groups, and so does a depthwise
    convolution; what is concatenated, normalised over channels, returned or done by a call that is not known
    stays whole.  A pad of channels makes a group of its own, of the same share.
    """

    reads: dict[str, int] = field(default_factory=dict)
    makes: dict[str, int] = field(default_factory=dict)
    norms: dict[int, int] = field(default_factory=dict)
    whole: dict[int, str] = field(default_factory=dict)
    channels: dict[int, int] = field(default_factory=dict)
    _parents: dict[int, int] = field(default_factory=dict)

    def of(self, number: int) -> int:
        """The group of a value, by the number that stands for it."""
        while self._parents.get(number, number) != number:
            number = self._parents[number]
        return number

    def shrinks(self, number: int) -> bool:
        """Whether the channels of that group may be fewer."""
        return self.of(number) not in self.whole

    def shrinking(self) -> set[int]:
        """The groups, of those that layers read or make, whose channels may be fewer."""
        return {self.of(number) for number in (*self.reads.values(), *self.makes.values())} - set(self.whole)

    def alone(self, number: int) -> ChannelGroups:
        """The same groups, of which only that one may have fewer channels."""
        others = self.shrinking() - {self.of(number)}
        return replace(self, whole=self.whole | dict.fromkeys(others, "another is looked at"))

    def join(self, *numbers: int) -> None:
        """These values have the same channels."""
        roots = sorted({self.of(number) for number in numbers})
        for root in roots[1:]:
            self._parents[root] = roots[0]
            if root in self.whole:
                self.whole.setdefault(roots[0], self.whole[root])

    def keep(self, number: int, reason: str) -> None:
        """All channels of that value stay."""
        self.whole.setdefault(self.of(number), reason)


def channel_groups(tape: Tape, sites: Mapping[str, Site], *, pads: bool = True) -> ChannelGroups:
    """The groups of a run; without `pads`, what is padded stays whole."""
    found = ChannelGroups()
    for number in tape.inputs:
        found.keep(number, "the model reads it")
    for call in tape.calls:
        _follow(call, sites, found, pads=pads)
    for number in (leaf.number for leaf in leaves(tape.output) if isinstance(leaf, Ref)):
        found.keep(number, "the model returns it")
    for name, number in found.makes.items():
        _count(found, number, sites[name].o)
    for name, number in found.reads.items():
        group = found.of(number)
        if sites[name].i % found.channels.get(group, sites[name].i):
            found.keep(number, f"what {name!r} sums over are not whole channels of it")
    found.reads = {name: found.of(number) for name, number in found.reads.items()}
    found.makes = {name: found.of(number) for name, number in found.makes.items()}
    found.norms = {name: found.of(number) for name, number in found.norms.items()}
    return found


def _count(found: ChannelGroups, number: int, channels: int) -> None:
    group = found.of(number)
    if found.channels.setdefault(group, channels) != channels:
        found.keep(number, "layers of different widths meet in it")


def _follow(call: Call, sites: Mapping[str, Site], found: ChannelGroups, *, pads: bool) -> None:
    read, written = list(dict.fromkeys(call.reads())), list(call.writes())
    if call.site is not None and call.site in sites:
        _layer(call, sites[call.site], found, read, written)
    elif call.name == _NORM and len(read) == len(written) == 1 and isinstance(mean := _mean(call), Tensor):
        found.norms[id(mean)] = read[0]
        found.join(*read, *written)
    elif (call.name in _PASSES and len(read) == 1) or (
        call.name in _JOINS and next(_constants(call), None) is None
    ):
        found.join(*read, *written)
    elif not (call.name == _PAD and pads):
        for number in (*read, *written):
            found.keep(number, f"it goes through {call.name}")


def _layer(call: Call, site: Site, found: ChannelGroups, read: list[int], written: list[int]) -> None:
    depthwise = site.groups > 1 and site.groups == site.i == site.o
    if len(read) != 1 or len(written) != 1 or (site.groups > 1 and not depthwise):
        for number in (*read, *written):
            found.keep(
                number, f"{site.name} is grouped" if site.groups > 1 else f"{site.name} reads several values"
            )
    if depthwise:
        found.join(*read, *written)
    for places, numbers in ((found.reads, read), (found.makes, written)):
        if site.name in places:
            found.join(places[site.name], *numbers)
        if numbers:  # a run that leaves torch does not say what some calls read
            places.setdefault(site.name, numbers[0])


def _mean(call: Call) -> Any:
    return call.args[1] if len(call.args) > 1 else call.kwargs.get("running_mean")


def _constants(call: Call) -> Iterator[Tensor]:
    """Tensors of the model that a call reads besides values of the run, single numbers left out."""
    return (
        leaf
        for leaf in leaves((call.args, dict(call.kwargs)))
        if isinstance(leaf, Tensor) and leaf.numel() > 1
    )
