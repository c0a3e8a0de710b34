"""A tensor into a packed block and back."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tdpass.errors import InvalidModelError
from tdpass.packing.floats import DTYPES, Bits, from_bits, sign_bit, to_bits, unsigned
from tdpass.packing.grids import find_multiples
from tdpass.packing.header import (
    MOST_AXES,
    MOST_ELEMENTS,
    PER_BYTE,
    Header,
    content_check,
    read_header,
    sealed,
)
from tdpass.packing.positions import Mask, choose_learning, code_positions, folded
from tdpass.packing.stream import Ints, Reader, Stream, Writer, learned_symbols
from tdpass.packing.values import SIGN_PRIOR, code_indices, describe, levels_of, restore

_WORTH = 0.75
_SPARSE = 0.25
_FEW = 1 << 9
_GLANCE = 1 << 16


def pack(tensor: Tensor) -> bytes | None:
    """The block of a floating-point tensor.

    None where it is not at most 3/4 of the plain size, or an element is not finite. A tensor with neither a
    quarter of zeros nor levels is left alone, even where its exponents could be coded in fewer bits.
    """
    if (
        tensor.dtype not in DTYPES
        or tensor.layout is not torch.strided
        or tensor.is_meta
        or tensor.dim() > MOST_AXES
    ):
        return None
    plain = tensor.numel() * tensor.element_size()
    if not 0 < tensor.numel() <= MOST_ELEMENTS or not bool(torch.isfinite(tensor).all()):
        return None
    bits = to_bits(tensor)
    block = (
        _pack(bits, tensor.dtype, tuple(tensor.shape))
        if _promising(bits, tensor.dtype, tuple(tensor.shape))
        else None
    )
    return (
        block
        if block is not None and len(block) <= _WORTH * plain and tensor.numel() <= PER_BYTE * len(block)
        else None
    )


def unpack(block: bytes, name: str = "") -> Tensor:
    """The tensor of a block, bit for bit; raises `InvalidModelError` naming it when the block is damaged."""
    header, data, stream = read_header(block, name)
    try:
        bits = _unpack(header, data, stream)
        if zlib.crc32(bits.tobytes()) & 0xFFFF != content_check(block):
            raise InvalidModelError("its content fails its checksum")
    except InvalidModelError as error:
        raise InvalidModelError(
            f"the packed tensor {name!r} is damaged: {error}; write the file again with Artifact.save"
        ) from None
    return from_bits(bits, header.dtype, header.shape)


def _promising(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether there are zeros or levels enough to try; looks at a part first."""
    magnitudes = bits & ~sign_bit(dtype)
    if np.count_nonzero(magnitudes) <= (1 - _SPARSE) * bits.size:
        return True
    levels = levels_of(magnitudes)
    if levels is not None and levels.size <= min(_FEW, bits.size // 2):
        return True
    rows = magnitudes.reshape(folded(shape))[: 1 + _GLANCE // folded(shape)[1]]
    counts = np.count_nonzero(rows, axis=1)
    counts = counts[counts > 0]
    return find_multiples(rows[rows != 0], dtype, np.cumsum(counts) - counts) is not None


def _pack(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    survives = (bits & ~sign_bit(dtype)) != 0
    mask = survives.reshape(folded(shape))
    survivors = bits[survives]
    negative_zeros = (bits[~survives] != 0).astype(np.int64)
    header = Header(dtype, shape, survivors.size, negative_zeros=bool(negative_zeros.any()))
    values = None
    if survivors.size:
        values = describe(survivors, dtype, mask.sum(axis=1))
        header = replace(
            header, levels=values.levels, learning=choose_learning(mask), kind=values.kind,
            grouped=values.grouped, alphabet=values.alphabet,
            prior=values.prior, scales=values.scales,
        )  # fmt: skip
    writer = Writer()
    _code_zeros(writer, header, mask, negative_zeros)
    if values is not None:
        code_indices(writer, values, header.kind, header.alphabet, header.prior, header.survivors)
    return sealed(
        header.to_bytes() + (values.data if values is not None else b"") + writer.finish(), bits.tobytes()
    )


def _unpack(header: Header, data: bytes, stream: bytes) -> Bits:
    reader = Reader(stream)
    mask, negative = _code_zeros(reader, header, None, None)
    if int(mask.sum()) != header.survivors:
        raise InvalidModelError(f"{int(mask.sum())} positions decode for {header.survivors} survivors")
    bits = np.zeros(header.elements, unsigned(header.dtype))
    survives = mask.ravel()
    if header.negative_zeros:
        bits[~survives] = np.where(negative == 1, sign_bit(header.dtype), bits[:1])
    if header.survivors:
        indices, signs = code_indices(
            reader, None, header.kind, header.alphabet, header.prior, header.survivors
        )
        bits[survives] = restore(header.kind, data, indices, signs, _groups(header, mask), header.dtype)
    return bits


def _code_zeros(
    stream: Stream, header: Header, mask: Mask | None, negative: Ints | None
) -> tuple[Mask, Ints]:
    """Positions of survivors, and which zeros are negative."""
    found = code_positions(stream, folded(header.shape), header.survivors, header.learning, mask)
    if not header.negative_zeros:
        return found, np.zeros(0, np.int64)
    return found, learned_symbols(stream, 2, header.elements - header.survivors, SIGN_PRIOR, negative)


def _groups(header: Header, mask: Mask) -> Ints:
    """The index of each survivor's scale."""
    if not header.grouped:
        return np.zeros(header.survivors, np.int64)
    counts = mask.sum(axis=1)
    counts = counts[counts > 0]
    if counts.size != header.scales:
        raise InvalidModelError(f"it has {header.scales} scales for {counts.size} rows")
    return np.repeat(np.arange(counts.size), counts)
