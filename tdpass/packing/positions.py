"""Where the survivors of a pruned tensor are: a bitmap whose rates follow its rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tdpass.packing.stream import ONE, Ints, Scale, Stream, learned_symbols

Mask = npt.NDArray[np.bool_]

# Strength of the expected count against the seen one, in quarters of an element; 0 stands for one rate
# throughout.
STRENGTHS = (0, 1, 2, 4, 8, 16, 32, 64, 256)
_TRIED = (1, 4, 7)
_FLAG_PRIOR = 8
_MOST_LEARNED = 1 << 20
_SAMPLED = 1 << 20
_TOP = ONE - ONE // 256


@dataclass(frozen=True)
class Learning:
    """How positions are coded.

    They are indices into `STRENGTHS` for rows and columns, and whether empty ones are named first.
    """

    rows: int = 0
    columns: int = 0
    named: bool = False


def folded(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix: its first axis against all others."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def code_positions(
    stream: Stream, shape: tuple[int, int], count: int, learning: Learning, known: Mask | None
) -> Mask:
    """The mask of a matrix with `count` survivors, written or read.

    p = K/N * row factor * column factor, each factor (4 seen + s) / (4 expected + s) of its row or column up
    to now.
    """
    if count in {0, shape[0] * shape[1]}:
        return np.full(shape, count > 0)
    if not learning.named:
        return _matrix(stream, shape, count, learning, known)
    rows, columns = (
        learned_symbols(
            stream,
            2,
            shape[axis],
            _FLAG_PRIOR,
            None if known is None else np.asarray(known.any(axis=1 - axis), np.int64),
        )
        == 1
        for axis in (0, 1)
    )
    inner = (int(rows.sum()), int(columns.sum()))
    place = np.ix_(rows, columns)
    mask = np.zeros(shape, bool)
    if count < inner[0] * inner[1]:
        mask[place] = _matrix(stream, inner, count, learning, None if known is None else known[place])
    else:
        mask[place] = True
    return mask


def choose_learning(known: Mask) -> Learning:
    """The cheapest way to code a mask, tried on its first million elements."""
    count = int(known.sum())
    if count in {0, known.size}:
        return Learning()
    sample = known[: max(1, _SAMPLED // max(1, known.shape[1]))]
    named = [False] if known.any(axis=0).all() and known.any(axis=1).all() else [False, True]

    def cost(learning: Learning) -> float:
        scale = Scale()
        code_positions(scale, (sample.shape[0], sample.shape[1]), int(sample.sum()), learning, sample)
        return scale.bits

    best = (math.inf, Learning())
    for first in named:
        found = min((cost(Learning(0, column, first)), column) for column in (0, *_TRIED))
        trials = [(found[0], Learning(0, found[1], first))]
        trials += [(cost(option), option) for option in (Learning(row, found[1], first) for row in _TRIED)]
        best = min(best, *trials, key=lambda trial: trial[0])
    return best[1]


def _matrix(
    stream: Stream, shape: tuple[int, int], count: int, learning: Learning, known: Mask | None
) -> Mask:
    """Tile by tile; counts are brought up to date after each tile."""
    cells = shape[0] * shape[1]
    base = min(max(count * ONE // cells, 1), ONE - 1)
    height, width = _tile(shape)
    by_row = STRENGTHS[learning.rows] if shape[1] <= _MOST_LEARNED else 0
    by_column = STRENGTHS[learning.columns] if shape[0] <= _MOST_LEARNED else 0
    mask = np.zeros(shape, bool)
    in_columns = np.zeros(shape[1], np.int64)
    for top in range(0, shape[0], height):
        in_rows = np.zeros(min(height, shape[0] - top), np.int64)
        column_factors = _factors(in_columns, top * base, by_column)
        for left in range(0, shape[1], width):
            tile = np.s_[top : top + height, left : left + width]
            rows = np.minimum(base * _factors(in_rows, left * base, by_row) >> 16, 16 * ONE)
            rates = np.clip(
                rows[:, None] * column_factors[None, left : left + width] >> 16, 1, max(base, _TOP)
            )
            found = stream.cells(
                rates.ravel(), None if known is None else known[tile].ravel().astype(np.int64)
            ).reshape(rates.shape)
            mask[tile] = found
            in_rows += found.sum(axis=1)
            in_columns[left : left + width] += found.sum(axis=0)
    return mask


def _factors(seen: Ints, expected: int, strength: int) -> Ints:
    """16-bit fixed-point factors by which rows or columns differ from the base rate.

    `expected` has 24 bits of fraction.
    """
    if strength == 0:
        return np.full(seen.shape, 1 << 16, np.int64)
    factors: Ints = ((4 * seen + strength) << 40) // (4 * expected + (strength << 24))
    return np.clip(factors, 1, 1 << 32)


def _tile(shape: tuple[int, int]) -> tuple[int, int]:
    side = 32 if shape[0] * shape[1] < 1 << 21 else 64
    height = min(shape[0], side)
    width = min(shape[1], side * side // height)
    return min(shape[0], side * side // width), width
