"""How the weights of sites use arrays: what that costs, and which cells are filled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tdpass.cost import Cost
from tdpass.crossbars.placement import Place, array_sets, fillings, placed_together
from tdpass.form import DENSE
from tdpass.report import ArrayBlock, ArrayRow
from tdpass.site import Site
from tdpass.targets.crossbar import CrossbarArray, CrossbarTarget
from tdpass.targets.workload import as_matrices


@dataclass(frozen=True)
class Use:
    """The arrays of one site: what they cost, and what lies in each set of copies.

    They cost nothing where the site was not seen running.
    """

    cost: Cost
    arrays: int
    rows: tuple[ArrayRow, ...]


def uses_of(sites: Mapping[str, Site], weights: Mapping[str, Tensor], array: CrossbarArray) -> dict[str, Use]:
    """Every site's, its weights `[o, i / groups, *kernel]` mapped without those that are zero."""
    target, found, first = CrossbarTarget(array), dict[str, Use](), 0
    for name, site in sites.items():
        kept = as_matrices(weights[name] != 0, site.groups)
        places = [place for together in placed_together(list(kept), array) for place in together]
        filled = fillings(places)
        cost = target.cost_filled(site, filled) if site.seen else Cost()
        rows = _rows(name, places, kept[0] if len(kept) == 1 else None, array, first)
        found[name] = Use(cost, array.arrays(filled), rows)
        first += array_sets(places)
    return found


def dense_costs(sites: Mapping[str, Site], array: CrossbarArray) -> dict[str, Cost]:
    """What the whole matrices cost; nothing for a site that was not seen running."""
    target = CrossbarTarget(array)
    return {name: target.cost(site, [DENSE])[0] if site.seen else Cost() for name, site in sites.items()}


def _rows(
    name: str, places: list[Place], kept: Tensor | None, array: CrossbarArray, first: int
) -> tuple[ArrayRow, ...]:
    held: dict[int, list[ArrayBlock]] = defaultdict(list)
    for place in places:
        high, wide = len(place.rows), len(place.columns)
        used = (
            high * wide
            if kept is None
            else int(kept[list(place.rows)][:, list(place.columns)].count_nonzero())
        )
        held[place.array].append(ArrayBlock(place.row, place.column, high, wide, used))
    return tuple(
        ArrayRow(name, first + number, array.rows, array.width, array.copies, tuple(blocks))
        for number, blocks in held.items()
    )
