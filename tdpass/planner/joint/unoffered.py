"""Why sites that could have taken part in a joint change are in no option of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdpass.planner.joint.base import JOINT_CHANGES, JointChange
from tdpass.planner.joint.options import JointOption
from tdpass.site import Site
from tdpass.tape import Tape


def unoffered(
    options: Sequence[JointOption], tapes: Sequence[Tape], sites: Mapping[str, Site]
) -> dict[str, str]:
    """Reasons by site, of all changes that are offered and can say so; none for sites in options of these."""
    found, taken = dict[str, str](), set[str]()
    for change in JOINT_CHANGES:
        own = [option for option in options if option.change == change.name]
        reasons = _reasons(change, own, tapes, sites) if change.offered else {}
        if reasons:
            found |= reasons
            taken.update(name for option in own for name in option.parts)
    return {name: reason for name, reason in found.items() if name not in taken}


def _reasons(
    change: JointChange, options: Sequence[JointOption], tapes: Sequence[Tape], sites: Mapping[str, Site]
) -> dict[str, str]:
    reasons = {name: why for name, why in change.declined(tapes, sites).items() if name in sites}
    if not change.uncarried:
        return reasons
    made = {tuple(sorted(option.parts)) for option in options}
    tried = (group for group in change.find(tapes, sites) if change.worth_trying(group, sites))
    return {**reasons, **{group[-1]: change.uncarried for group in tried if tuple(sorted(group)) not in made}}
