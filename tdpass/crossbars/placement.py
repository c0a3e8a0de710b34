"""Where the weights of a matrix lie: its blocks without what is zero, in as few arrays as they fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from tdpass.documents import Count, Size
from tdpass.targets.crossbar import Block, CrossbarArray, Filling


@dataclass(frozen=True)
class Place:
    """A block of a matrix in a set of arrays, which hold one copy of it each.

    `rows` and `columns` are those of the matrix, in the order of the word lines from `row` on and of the
    columns of weights from `column` on.  `groups` are the numbers of consecutive word lines that are driven
    together.
    """

    array: Count
    row: Count
    column: Count
    rows: tuple[Count, ...]
    columns: tuple[Count, ...]
    groups: tuple[Size, ...]


def placed(kept: Tensor, array: CrossbarArray, first: int = 0) -> tuple[Place, ...]:
    """Places for the weights of a matrix `[depth, columns]` where the booleans say so.

    They lie in sets of arrays from `first` on. Rows and columns that are empty in a block are left out of it,
    and blocks that are then smaller share arrays along their diagonals.  Every array has inputs and outputs
    of its own, so the blocks are those of the matrix as it is, of the matrix without rows and columns that
    are empty throughout, of the rows that are left in each width of columns, or of the columns that are left
    in each height of rows: whichever takes the fewest arrays, then the fewest conversions.
    """
    every = list(range(len(kept))), list(range(kept.shape[1]))
    rows, columns = _filled(kept, 1), _filled(kept, 0)
    cuts = (
        [(r, c) for r in _cut(every[0], array.rows) for c in _cut(every[1], array.width)],
        [(r, c) for r in _cut(rows, array.rows) for c in _cut(columns, array.width)],
        [(r, c) for c in _cut(columns, array.width) for r in _cut(_filled(kept[:, c], 1), array.rows)],
        [(r, c) for r in _cut(rows, array.rows) for c in _cut(_filled(kept[r], 0), array.width)],
    )
    choices = [_in_order(_packed(_blocks(kept, cut, array), array, first)) for cut in cuts]
    return min(choices, key=lambda places: (array_sets(places), _conversions(places), len(places)))


def placed_together(kept: Sequence[Tensor], array: CrossbarArray, first: int = 0) -> list[tuple[Place, ...]]:
    """Places for each of the matrices of a grouped layer, which share arrays along their diagonals."""
    apart = [placed(matrix, array) for matrix in kept]
    packed = iter(_packed([place for places in apart for place in places], array, first))
    return [_in_order(next(packed) for _ in places) for places in apart]


def array_sets(places: Iterable[Place]) -> int:
    """How many sets of arrays they lie in."""
    return len({place.array for place in places})


def fillings(places: Iterable[Place]) -> list[Filling]:
    """What lies in each set of arrays, as costs are computed from."""
    held: dict[int, list[Block]] = defaultdict(list)
    for place in places:
        held[place.array].append(Block(len(place.rows), len(place.columns), len(place.groups)))
    return [Filling(tuple(blocks)) for blocks in held.values()]


def _filled(kept: Tensor, axis: int) -> list[int]:
    """The rows (axis 1) or columns (axis 0) that are not empty."""
    found: list[int] = kept.any(axis).nonzero().flatten().tolist()
    return found


def _cut(lines: Sequence[int], size: int) -> list[Sequence[int]]:
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def _conversions(places: Iterable[Place]) -> int:
    return sum(len(place.groups) * len(place.columns) for place in places)


def _blocks(
    kept: Tensor, cut: Iterable[tuple[Sequence[int], Sequence[int]]], array: CrossbarArray
) -> list[Place]:
    """The parts of the matrix at these rows and columns, without those that are empty in them."""
    found = []
    for rows, columns in cut:
        part = kept[rows][:, columns]
        lines, across = [rows[k] for k in _filled(part, 1)], [columns[k] for k in _filled(part, 0)]
        if lines:
            found.append(Place(0, 0, 0, tuple(lines), tuple(across), _groups(lines, array)))
    return found


def _groups(rows: Sequence[int], array: CrossbarArray) -> tuple[int, ...]:
    """Word lines driven at once: as many as may be, or the rows that are left of each fragment."""
    if array.signs == "fragments":
        return tuple(len(list(run)) for _, run in groupby(rows, key=lambda row: row // array.rows_at_once))
    return tuple(
        min(array.rows_at_once, len(rows) - start) for start in range(0, len(rows), array.rows_at_once)
    )


def _in_order(places: Iterable[Place]) -> tuple[Place, ...]:
    return tuple(sorted(places, key=lambda place: (place.array, place.row)))


def _packed(blocks: Sequence[Place], array: CrossbarArray, first: int) -> list[Place]:
    """Each block's place, side by side along the diagonals of arrays.

    The largest come first, each where it first fits.
    """
    filled: list[tuple[int, int]] = []
    open_arrays: list[int] = []
    found = dict[int, Place]()
    for index in sorted(
        range(len(blocks)), key=lambda index: -len(blocks[index].rows) * len(blocks[index].columns)
    ):
        block = blocks[index]
        high, wide = len(block.rows), len(block.columns)
        place = next(
            (
                k
                for k in open_arrays
                if filled[k][0] + high <= array.rows and filled[k][1] + wide <= array.width
            ),
            None,
        )
        if place is None:
            place = len(filled)
            filled.append((0, 0))
            open_arrays.append(place)
        row, column = filled[place]
        found[index] = replace(block, array=first + place, row=row, column=column)
        filled[place] = row + high, column + wide
        if filled[place][0] == array.rows or filled[place][1] == array.width:
            open_arrays.remove(place)
    return [found[index] for index in range(len(blocks))]
