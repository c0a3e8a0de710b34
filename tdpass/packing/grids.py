"""Values that are whole multiples, or powers of two times, of a scale: found, and made again bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tdpass.packing.floats import Bits, Floats, numbers, rounded, sign_bit, spacing
from tdpass.packing.stream import Ints

MOST_LEVELS = 1 << 15
MOST_POWERS = 1 << 11
_LEAST_MULTIPLES = 8
_GLANCE = 1 << 14


@dataclass(frozen=True)
class Grid:
    """Magnitudes as scale[group] * (index + 1), or scale * 2^index.

    Scales are float64, of which `narrow` are float32 too.
    """

    scales: Floats
    indices: Ints
    narrow: bool


def find_multiples(magnitudes: Bits, dtype: torch.dtype, starts: Ints) -> Grid | None:
    """The grid of positive magnitudes that come in groups, each with its own scale.

    None where some are on none. Every level k bounds the scale to [(v - ulp/2) / k, (v + ulp/2) / k]; a scale
    within all bounds is tried and kept when the products have the same bits.  The least magnitude may itself
    be the 1st to 8th level.
    """
    glance = magnitudes[:_GLANCE]
    if glance.size < magnitudes.size and _solve(glance, dtype, starts[starts < glance.size]) is None:
        return None
    return _solve(magnitudes, dtype, starts)


def _solve(magnitudes: Bits, dtype: torch.dtype, starts: Ints) -> Grid | None:
    values = numbers(magnitudes, dtype)
    group = np.repeat(np.arange(starts.size), np.diff(starts, append=values.size))
    least = np.minimum.reduceat(values, starts)
    half = spacing(values, dtype) / 2
    scales, solved, kept = np.zeros_like(least), np.zeros(starts.size, bool), np.zeros_like(values)
    for multiple in range(1, _LEAST_MULTIPLES + 1):
        levels = np.rint(values / (least / multiple)[group])
        few = np.maximum.reduceat(levels, starts) <= MOST_LEVELS
        low, high = (
            np.maximum.reduceat((values - half) / levels, starts),
            np.minimum.reduceat((values + half) / levels, starts),
        )
        for trial in (least / multiple, (low + high) / 2):
            for candidate in (trial.astype(np.float32).astype(np.float64), trial):
                same = rounded(levels * candidate[group], dtype) == magnitudes
                fits = few & np.logical_and.reduceat(same, starts) & ~solved
                scales[fits] = candidate[fits]
                kept = np.where(fits[group], levels, kept)
                solved |= fits
            if solved.all():
                return Grid(
                    scales, kept.astype(np.int64) - 1, bool((scales.astype(np.float32) == scales).all())
                )
        if starts.size == 1 and not few.all():
            return None
    return None


def find_powers(magnitudes: Bits, dtype: torch.dtype) -> Grid | None:
    """The grid scale * 2^index of positive magnitudes.

    None where their mantissas differ or they lie too far apart.
    """
    values = numbers(magnitudes, dtype)
    fractions, exponents = np.frexp(values)
    if (fractions != fractions[0]).any():
        return None
    indices = exponents.astype(np.int64) - int(exponents.min())
    if int(indices.max()) >= MOST_POWERS:
        return None
    return Grid(values.min(keepdims=True), indices, narrow=False)


def multiples(scales: Floats, group: Ints, indices: Ints, dtype: torch.dtype) -> Bits:
    """Bits of scale[group] * (index + 1)."""
    return rounded(scales[group] * (indices + 1), dtype)


def powers(scale: float, indices: Ints, dtype: torch.dtype) -> Bits:
    """Bits of scale * 2^index."""
    values: npt.NDArray[np.float64] = np.ldexp(scale, indices.astype(np.int32))
    return rounded(values, dtype)


def with_signs(magnitudes: Bits, negative: npt.NDArray[np.bool_], dtype: torch.dtype) -> Bits:
    """Magnitudes with the sign bit set where negative."""
    signed: Bits = np.where(negative, magnitudes | sign_bit(dtype), magnitudes)
    return signed
