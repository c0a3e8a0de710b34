"""What the layers of an attention become together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdpass.planner.heads import Attention, find_attentions, find_bonds
from tdpass.planner.joint.base import Group, JointChange
from tdpass.planner.rank_plan import Choice
from tdpass.site import Site
from tdpass.tape import Tape


class AttentionChange(JointChange):
    """A change of the layers that make queries, keys and values and the one that reads the heads, in turn."""

    uncarried = "its heads stay as they are: with others the model does not run, or answers otherwise"

    def declined(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> Mapping[str, str]:
        reasons = find_bonds(tapes[0]).reasons
        return {name: f"its heads stay as they are: {reason}" for name, reason in reasons.items()}

    def find(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Group]:
        found = find_attentions(tapes[0], sites).values()
        return [
            group
            for group in map(self.takes, filter(self.fits, found))
            if all(len(tape.site_calls.get(name, ())) == 1 for tape in tapes for name in group)
        ]

    def fits(self, attention: Attention) -> bool:
        """Whether it can be made to an attention."""
        return attention.even

    def takes(self, attention: Attention) -> Group:
        """The sites of an attention that take part, the one that reads the heads last."""
        return (*attention.makers, attention.reader)

    def planned(self, choices: Sequence[Choice]) -> bool:
        return all(choice.channels == choices[-1].channels for choice in choices)
