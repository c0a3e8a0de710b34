"""prune-gated: fewer channels of a gated MLP, the same of the gate and of what it gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdpass.planner.joint.base import Group, register_joint_change
from tdpass.planner.joint.channel_groups import channel_groups
from tdpass.planner.joint.prune_channels import PruneChannels
from tdpass.site import Site
from tdpass.tape import Tape

_MAKERS = range(2, 4)


@register_joint_change
class PruneGated(PruneChannels):
    """`W3 (f(W1 x) * W2 x)` on channels that are kept of both, W3 the best there is on them.

    The channels of W1 and W2 meet in products or sums and nowhere else, and W3 alone reads them, as in the
    gated MLPs of Llama (Shazeer, GLU Variants Improve Transformer, 2020).
    """

    name = "prune-gated"

    def find(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Group]:
        first, *others = (_gated(tape, sites) for tape in tapes)
        return [group for group in first if all(group in each for each in others)]


def _gated(tape: Tape, sites: Mapping[str, Site]) -> list[Group]:
    """The layers that make the channels of a group, front to back, then the one that reads them."""
    groups = channel_groups(tape, sites, pads=False)
    normed = {groups.of(number) for number in groups.norms.values()}
    found: list[Group] = []
    for number in dict.fromkeys(groups.makes.values()):
        makers = [name for name, made in groups.makes.items() if made == number]
        readers = [name for name, read in groups.reads.items() if read == number]
        if len(makers) not in _MAKERS or len(readers) != 1 or number in normed or not groups.shrinks(number):
            continue
        members = (*sorted(makers, key=lambda name: tape.site_calls[name][0]), *readers)
        if all(_whole(tape, sites[name]) for name in members) and _alike(tape, members, sites):
            found.append(members)
    return found


def _whole(tape: Tape, site: Site) -> bool:
    return len(tape.site_calls[site.name]) == 1 and site.groups == 1 and not site.table


def _alike(tape: Tape, members: Group, sites: Mapping[str, Site]) -> bool:
    """Whether all have as many channels, along the same axis, and the last does not read what it makes."""
    *makers, reader = members
    if reader in makers or {sites[name].o for name in makers} != {sites[reader].i}:
        return False
    calls = {name: tape.calls[tape.site_calls[name][0]] for name in members}
    axes = {sites[name].channel_axis(len(calls[name].shapes[1])) for name in makers}
    return axes == {sites[reader].channel_axis(len(calls[reader].shapes[0]))}
