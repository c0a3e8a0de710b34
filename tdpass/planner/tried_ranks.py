"""Which ranks of a format are tried at a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tdpass.form import DENSE, Form, Rank
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import cost_of, shrinks
from tdpass.site import Site

Filling = Callable[[Site, str, Sequence[Rank]], Sequence[Rank]]
_ABOVE = 4  # for so many ranks that are tried of a format, one above them of the one that holds nothing twice


def as_given(site: Site, format_name: str, ranks: Sequence[Rank]) -> Sequence[Rank]:
    """The ranks as they are, for no machine in particular."""
    return ranks


def worthwhile_ranks(
    site: Site, format_name: str, limit: int, filling: Filling = as_given, present: Form = DENSE
) -> list[Rank]:
    """Up to `limit` ranks of a format that make the site cheaper in every known measure.

    They come largest first, and the smallest is among them. A single one is that which comes nearest to half
    of the parameters.  `filling` says which of them fill a machine.  A format that is another one without
    what that holds twice tries the same ranks, at its lower costs, so that no plan is worse for it, and a few
    of those above that only it makes cheaper.
    """
    fmt, now = FORMATS.get(format_name), cost_of(site, present)
    cheaper = [rank for rank in fmt.ranks(site) if shrinks(site, format_name, rank, present)]
    filled = filling(site, format_name, cheaper)
    cheaper = [rank for rank in filled if shrinks(site, format_name, rank, present)]
    if limit == 1 and cheaper:
        return [min(cheaper, key=lambda rank: abs(2 * fmt.cost(site, rank).params - now.params))]
    if fmt.chain.name == fmt.name:
        return _spread(cheaper, limit)
    same = [
        rank for rank in worthwhile_ranks(site, fmt.chain.name, limit, filling, present) if rank in cheaper
    ]
    dearest = max((cheaper.index(rank) for rank in same), default=-1)
    return [*_spread(cheaper[dearest + 1 :], max(1, limit // _ABOVE)), *same]


def _spread(ranks: Sequence[Rank], limit: int) -> list[Rank]:
    """Up to so many of the ranks, evenly by place, the last first."""
    step = max(1, -(-len(ranks) // limit))
    count = -(-len(ranks) // step)
    return [ranks[round(k * (len(ranks) - 1) / max(count - 1, 1))] for k in reversed(range(count))]
