"""What the layers of an attention become together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdpass.planner.heads import find_attentions
from tdpass.planner.joint.base import Group, JointChange
from tdpass.planner.rank_plan import Choice
from tdpass.site import Site
from tdpass.tape import Tape


class AttentionChange(JointChange):
    """A change of the layers that make queries, keys and values and the one that reads the heads, in turn."""

    def find(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Group]:
        return [
            group
            for group in find_attentions(tapes[0], sites)
            if all(len(tape.site_calls.get(name, ())) == 1 for tape in tapes for name in group)
        ]

    def planned(self, choices: Sequence[Choice]) -> bool:
        return all(choice.channels == choices[-1].channels for choice in choices)
