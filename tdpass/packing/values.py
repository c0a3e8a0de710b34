"""What the survivors are: raw bits, a table of levels, or a grid, whichever takes the fewest bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from tdpass.errors import InvalidModelError
from tdpass.packing.floats import Bits, Floats, sign_bit, unsigned
from tdpass.packing.grids import (
    MOST_LEVELS,
    MOST_POWERS,
    Grid,
    find_multiples,
    find_powers,
    multiples,
    powers,
    with_signs,
)
from tdpass.packing.stream import Ints, Stream, learned_symbols, weighed

PRIORS = (1, 4, 16, 64)
MOST_ENTRIES = 1 << 12
SIGN_PRIOR = 8
_SAMPLED = 1 << 16


class Kind(IntEnum):
    """How values are held; those from `MAGNITUDES` on hold magnitudes, with a sign each in the stream."""

    RAW = 0
    TABLE = 1
    MAGNITUDES = 2
    MULTIPLES = 3
    WIDE_MULTIPLES = 4
    POWERS = 5


@dataclass(frozen=True)
class Values:
    """Survivors ready to be written; `bits` is what they take, `data` included.

    `levels` counts the distinct ones, 0 when raw.
    """

    kind: Kind
    grouped: bool
    alphabet: int
    prior: int
    data: bytes
    indices: Ints
    negative: npt.NDArray[np.bool_]
    bits: float
    levels: int = 0
    scales: int = 1

    @classmethod
    def weigh(
        cls,
        kind: Kind,
        alphabet: int,
        data: bytes,
        indices: Ints,
        negative: npt.NDArray[np.bool_],
        grouped: bool = False,
    ) -> Values:
        bits, prior = weighed(alphabet, indices, PRIORS)
        signs = weighed(2, negative.astype(np.int64), (SIGN_PRIOR,))[0] if kind >= Kind.MAGNITUDES else 0.0
        return cls(kind, grouped, alphabet, prior, data, indices, negative, bits + signs + 8 * len(data))


def levels_of(bits: Bits) -> Bits | None:
    """The distinct bit patterns, sorted; None where there are too many for a table."""
    sample = bits[:: max(1, bits.size // _SAMPLED)]
    if bits.size > _SAMPLED and np.unique(sample).size > sample.size // 2:
        return None
    levels = np.unique(bits)
    return levels if levels.size <= MOST_ENTRIES else None


def describe(bits: Bits, dtype: torch.dtype, rows: Ints) -> Values:
    """The cheapest form of survivors, none of them a zero; `rows` says how many each row has."""
    best = min(_forms(bits, dtype, rows), key=lambda values: values.bits)
    if best.kind is Kind.RAW:
        return best
    if best.grouped:
        return replace(
            best, levels=np.unique(2 * best.indices + best.negative).size, scales=int(np.count_nonzero(rows))
        )
    return replace(best, levels=np.unique(bits).size)


def _forms(bits: Bits, dtype: torch.dtype, rows: Ints) -> Iterator[Values]:
    negative = (bits & sign_bit(dtype)) != 0
    planes = bits.astype(bits.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, dtype.itemsize)
    yield Values.weigh(Kind.RAW, 256, planes[:, :-1].tobytes(), planes[:, -1].astype(np.int64), negative)
    magnitudes = bits & ~sign_bit(dtype)
    levels = levels_of(bits)
    if levels is not None:
        sizes = np.unique(levels & ~sign_bit(dtype))
        places = np.searchsorted(sizes, magnitudes)
        yield Values.weigh(Kind.TABLE, levels.size, _stored(levels), np.searchsorted(levels, bits), negative)
        yield Values.weigh(Kind.MAGNITUDES, sizes.size, _stored(sizes), places, negative)
        powers_of = find_powers(sizes, dtype)
        if powers_of is not None:
            yield Values.weigh(
                Kind.POWERS,
                int(powers_of.indices.max()) + 1,
                powers_of.scales.astype("<f8").tobytes(),
                powers_of.indices[places],
                negative,
            )
        grid = find_multiples(sizes, dtype, np.zeros(1, np.int64))
        if grid is not None:
            yield _multiples(replace(grid, indices=grid.indices[places]), negative, grouped=False)
            return
    counts = rows[rows > 0]
    if 1 < counts.size <= bits.size // 4:
        grid = find_multiples(magnitudes, dtype, np.cumsum(counts) - counts)
        if grid is not None:
            yield _multiples(grid, negative, grouped=True)


def _multiples(grid: Grid, negative: npt.NDArray[np.bool_], grouped: bool) -> Values:
    data = grid.scales.astype("<f4" if grid.narrow else "<f8").tobytes()
    kind = Kind.MULTIPLES if grid.narrow else Kind.WIDE_MULTIPLES
    return Values.weigh(kind, int(grid.indices.max()) + 1, data, grid.indices, negative, grouped)


def _stored(bits: Bits) -> bytes:
    return bytes(bits.astype(bits.dtype.newbyteorder("<")).tobytes())


def data_size(kind: Kind, count: int, alphabet: int, scales: int, itemsize: int) -> int:
    """Bytes of `Values.data`; raises `InvalidModelError` for an alphabet that the kind cannot have."""
    allowed = {
        Kind.RAW: 256,
        Kind.MULTIPLES: MOST_LEVELS,
        Kind.WIDE_MULTIPLES: MOST_LEVELS,
        Kind.POWERS: MOST_POWERS,
    }.get(kind, MOST_ENTRIES)
    if not 1 <= alphabet <= allowed or (kind is Kind.RAW and alphabet != allowed):
        raise InvalidModelError(f"its values have an alphabet of {alphabet}; 1 to {allowed} are possible")
    sizes = {
        Kind.RAW: count * (itemsize - 1),
        Kind.MULTIPLES: 4 * scales,
        Kind.WIDE_MULTIPLES: 8 * scales,
        Kind.POWERS: 8,
    }
    return sizes.get(kind, alphabet * itemsize)


def code_indices(
    stream: Stream, values: Values | None, kind: Kind, alphabet: int, prior: int, count: int
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Indices and signs of the survivors, written or, without values, read."""
    indices = learned_symbols(
        stream, alphabet, count, PRIORS[prior], None if values is None else values.indices
    )
    if kind < Kind.MAGNITUDES:
        return indices, np.zeros(count, bool)
    return indices, learned_symbols(
        stream, 2, count, SIGN_PRIOR, None if values is None else values.negative.astype(np.int64)
    ) == 1


def restore(
    kind: Kind, data: bytes, indices: Ints, negative: npt.NDArray[np.bool_], group: Ints, dtype: torch.dtype
) -> Bits:
    """The bits of the survivors; `group` is the index of each one's scale."""
    little = unsigned(dtype).newbyteorder("<")
    if kind is Kind.RAW:
        planes = np.empty((indices.size, dtype.itemsize), np.uint8)
        planes[:, :-1] = np.frombuffer(data, np.uint8).reshape(indices.size, -1)
        planes[:, -1] = indices
        raw: Bits = planes.reshape(-1).view(little).astype(unsigned(dtype))
        return raw
    if kind in {Kind.TABLE, Kind.MAGNITUDES}:
        found: Bits = np.frombuffer(data, little).astype(unsigned(dtype))[indices]
    else:
        scales: Floats = np.frombuffer(data, "<f4" if kind is Kind.MULTIPLES else "<f8").astype(np.float64)
        found = (
            powers(float(scales[0]), indices, dtype)
            if kind is Kind.POWERS
            else multiples(scales, group, indices, dtype)
        )
    return found if kind is Kind.TABLE else with_signs(found, negative, dtype)
