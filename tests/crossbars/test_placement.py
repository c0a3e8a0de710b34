"""Where weights lie: each in one cell, blocks inside their arrays and apart from each other.

Arrays are as few as counting allows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tdpass.crossbars.placement import array_sets, fillings, placed, placed_together
from tdpass.crossbars.states import device_levels, digit_weights, states_of
from tdpass.crossbars.use import uses_of
from tdpass.errors import UsageError
from tdpass.form import DENSE
from tdpass.site import Site
from tdpass.targets.crossbar import CrossbarArray, CrossbarTarget
from tdpass.targets.workload import Product

ARRAY = replace(CrossbarArray.load("admm_32x32"), rows=8, columns=6, rows_at_once=8)
FORMS = replace(CrossbarArray.load("forms"), rows=8, columns=24, rows_at_once=4)


def mask_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    full = torch.ones(30, 20, dtype=torch.bool)
    if kind == "full":
        return full
    if kind == "columns":
        return full & (torch.rand(20, generator=generator) < 0.4)
    if kind == "rows":
        return full & (torch.rand(30, 1, generator=generator) < 0.5)
    if kind == "few":
        return torch.rand(30, 20, generator=generator) < 0.02
    if kind == "none":
        return ~full
    blocks = torch.zeros(30, 20, dtype=torch.bool)  # a few word lines in every block
    for top in range(0, 30, 8):
        for left in range(0, 20, 6):
            blocks[top + torch.randperm(min(8, 30 - top), generator=generator)[:2], left : left + 3] = True
    return blocks


KINDS = ("full", "columns", "rows", "few", "none", "blocks")


@pytest.mark.parametrize("array", [ARRAY, FORMS], ids=["pair", "forms"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_one_place_and_no_two_blocks_meet(kind: str, array: CrossbarArray) -> None:
    kept = mask_of(kind)
    times = torch.zeros(kept.shape)
    lines: dict[int, list[tuple[range, range]]] = {}
    places = placed(kept, array, 3)
    for place in places:
        assert place.array >= 3
        rows, columns = (
            range(start, start + len(lines))
            for start, lines in ((place.row, place.rows), (place.column, place.columns))
        )
        assert rows.stop <= array.rows
        assert columns.stop <= array.width
        assert sum(place.groups) == len(place.rows)
        assert max(place.groups) <= array.rows_at_once
        for other_rows, other_columns in lines.setdefault(
            place.array, []
        ):  # side by side on both axes, so that no current mixes
            assert not set(rows) & set(other_rows)
            assert not set(columns) & set(other_columns)
        lines[place.array].append((rows, columns))
        times[torch.tensor(place.rows)[:, None], torch.tensor(place.columns)] += 1
    assert bool((times[kept] == 1).all())
    assert array_sets(places) == len(lines)
    if array.signs == "fragments":
        fragments = [{row // array.rows_at_once for row in place.rows} for place in places]
        assert [len(place.groups) for place in places] == [len(found) for found in fragments]


def test_whole_columns_that_are_gone_leave_as_many_arrays_as_the_rest_counts() -> None:
    for kind, axis in (("columns", 0), ("rows", 1)):
        kept = mask_of(kind)
        left = int(kept.any(axis).sum())
        high, wide = (30, left) if kind == "columns" else (left, 20)
        assert array_sets(placed(kept, ARRAY)) <= math.ceil(high / 8) * math.ceil(wide / 6)
    assert array_sets(placed(mask_of("full"), ARRAY)) == 4 * 4
    assert placed(mask_of("none"), ARRAY) == ()


@pytest.mark.parametrize(("side", "sets"), [("rows", 8 * 2), ("columns", 8 * 3)])
def test_lines_that_are_left_of_blocks_fill_arrays(side: str, sets: int) -> None:
    """Two lines of each of 8 x 8 blocks, others in every one.

    Each width has 16 rows of 8 columns, or each height 16 columns of 8 rows.
    """
    generator = torch.Generator().manual_seed(4)
    kept = torch.zeros(64, 48, dtype=torch.bool)
    for top in range(0, 64, 8):
        for left in range(0, 48, 6):
            block = kept[top : top + 8, left : left + 6]
            lines = block if side == "rows" else block.T
            lines[torch.randperm(len(lines), generator=generator)[:2]] = True
    places = placed(kept, ARRAY)
    assert array_sets(places) == sets
    assert int(kept.sum()) == sum(len(place.rows) * len(place.columns) for place in places)


def test_small_blocks_share_arrays() -> None:
    # 16 blocks of 2 x 3 and narrower: two stand in the columns of one array
    assert array_sets(placed(mask_of("blocks"), ARRAY)) <= 8


def test_a_matrix_without_zeros_costs_what_the_target_says() -> None:
    product = Product(5, 30, 20, 1, 150, 100)
    dense = ARRAY.cost(5, ARRAY.fillings(product), 250)
    assert ARRAY.cost(5, fillings(placed(mask_of("full"), ARRAY)), 250) == dense
    site = Site("conv", "conv", (20, 6, 5, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), extents=(((9, 4), (5, 4)),))
    (use,) = uses_of({"conv": site}, {"conv": torch.ones(site.shape)}, ARRAY).values()
    assert use.cost == CrossbarTarget(ARRAY).cost(site, [DENSE])[0]
    assert use.arrays == 4 * 4 * 4


@pytest.mark.parametrize("groups", [2, 4, 12, 24])
def test_groups_share_arrays_along_their_diagonals_as_they_are_priced(groups: int) -> None:
    shape = (24, 24 // groups, 1, 2)
    site = Site(
        "conv", "conv", shape, (1, 1), ((0, 0), (0, 0)), (1, 1), groups=groups, extents=(((9, 4), (9, 3)),)
    )
    (use,) = uses_of({"conv": site}, {"conv": torch.ones(shape)}, ARRAY).values()
    priced = CrossbarTarget(ARRAY).cost(site, [DENSE])[0]
    if 2 * 24 // groups <= ARRAY.rows and 24 // groups <= ARRAY.width:
        assert use.cost == priced
    else:  # ragged tiles of larger groups share arrays that the price counts apart
        assert use.cost.get("area") <= priced.get("area")
    together = placed_together([torch.ones(2 * 24 // groups, 24 // groups) > 0] * groups, ARRAY, 5)
    lines: dict[int, tuple[set[int], set[int]]] = {}
    for place in (place for places in together for place in places):
        assert place.array >= 5
        rows, columns = lines.setdefault(place.array, (set(), set()))
        own = (
            set(range(place.row, place.row + len(place.rows))),
            set(range(place.column, place.column + len(place.columns))),
        )
        assert not rows & own[0]
        assert not columns & own[1]
        rows |= own[0]
        columns |= own[1]
    assert use.arrays == len(lines) * ARRAY.copies


def test_pruning_saves_conversions_even_where_it_saves_no_array() -> None:
    site = Site("fc", "linear", (6, 8), extents=(((1,), (1,)),))
    weight = torch.ones(6, 8)
    weight[:, ::2] = 0
    uses = [
        uses_of({"fc": site}, {"fc": w}, replace(ARRAY, rows_at_once=2))["fc"]
        for w in (torch.ones(6, 8), weight)
    ]
    assert uses[0].arrays == uses[1].arrays == 4
    assert uses[1].cost.get("joules") < uses[0].cost.get("joules")
    assert [block.weights for row in uses[1].rows for block in row.blocks] == [24]


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 9])
def test_the_cells_of_a_level_hold_what_it_stands_for(bits: int) -> None:
    array = replace(CrossbarArray.load("admm_32x32"), weight_bits=bits)
    levels, states = device_levels(array), states_of(array)
    assert len(levels.magnitudes) == 2 ** (bits - 1)
    assert states.shape == (2 ** (bits - 1), array.digits)
    siemens = torch.tensor(array.conductances, dtype=torch.float64)[states]
    torch.testing.assert_close(
        (siemens * digit_weights(array)).sum(1), torch.tensor(levels.magnitudes, dtype=torch.float64)
    )
    with pytest.raises(UsageError, match="priced, not mapped"):
        device_levels(CrossbarArray.load("isaac"))
