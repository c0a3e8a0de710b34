"""Channel pairs: two sites whose channels in between can be changed, since nothing else reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdpass.site import Site
from tdpass.tape import Call, Tape

Pair = tuple[str, str]


def find_pairs(tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Pair]:
    """Sites of which the first feeds the second alone, in every run; front to back.

    Between them are at most element-wise functions without parameters.
    """
    found = [_pairs(tape, sites) for tape in tapes]
    return [pair for pair in found[0] if all(pair in others for others in found[1:])]


def _pairs(tape: Tape, sites: Mapping[str, Site]) -> list[Pair]:
    once = {
        indices[0]: name
        for name, indices in tape.site_calls.items()
        if len(indices) == 1 and name in sites and not sites[name].table
    }
    pairs: list[Pair] = []
    for index, name in sorted(once.items()):
        reader = tape.channelwise_consumer(index)
        if reader in once and _meet(sites[name], tape.calls[index], sites[once[reader]], tape.calls[reader]):
            pairs.append((name, once[reader]))
    return pairs


def _meet(made: Site, making: Call, read: Site, reading: Call) -> bool:
    """Whether the channels that one call makes are those that the other sums over.

    They are as many, and on the same axis, since sizes of other axes may equal them.
    """
    whole = made.groups == read.groups == 1
    return (
        whole
        and made.o == read.i
        and made.channel_axis(len(making.shapes[1])) == read.channel_axis(len(reading.shapes[0]))
    )
