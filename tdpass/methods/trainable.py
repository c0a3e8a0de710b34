"""Which sites of a model a method may train."""

from __future__ import annotations

from collections.abc import Sequence

from tdpass.kinds import kind_of
from tdpass.models import Model
from tdpass.site import Site, selects


def trainable(
    opened: Model, include: Sequence[str], exclude: Sequence[str], grouped: bool = True
) -> list[Site]:
    """The dense sites of those names whose parameter itself is trained; of one group where not `grouped`.

    A table of which few samples read a row is none of them: most of it has no gradient to train by.
    """
    return [
        site
        for site in opened.sites()
        if selects(site.name, include, exclude)
        and kind_of(site).as_stored
        and (grouped or site.groups == 1)
        and not site.table
        and opened.layer(site.name) is None
    ]


def closed(opened: Model) -> str:
    """Which weights are no sites and could be, for an error of a method that has too few of them."""
    found = [f"{name} ({why})" for name, why in opened.declined().items() if "before training" in why]
    return f"; no sites yet are the weights of {', '.join(found)}" if found else ""


def as_stored(site: Site) -> bool:
    """Whether the parameter itself is the matrix or kernel that a constraint is about.

    Of one group, and not stored another way round.
    """
    return site.groups == 1 and kind_of(site).as_stored
