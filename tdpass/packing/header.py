"""The head of a packed block: written, read and held against what is possible."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch

from tdpass.errors import InvalidModelError
from tdpass.packing.floats import DTYPES
from tdpass.packing.positions import STRENGTHS, Learning
from tdpass.packing.values import PRIORS, Kind, data_size

VERSION = 1
MOST_AXES = 32
MOST_ELEMENTS = 1 << 31
PER_BYTE = (
    1 << 22
)  # elements that one byte may stand for: what a few bytes can make a reader allocate is bounded
_CHECK = 6
_ONE_RATE = Learning()


@dataclass(frozen=True)
class Header:
    """What a block holds.

    `scales` counts the scales of a grid, `levels` the distinct values, 0 when they are raw.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    survivors: int
    levels: int = 0
    negative_zeros: bool = False
    learning: Learning = _ONE_RATE
    kind: Kind = Kind.RAW
    grouped: bool = False
    alphabet: int = 256
    prior: int = 0
    scales: int = 1

    @property
    def elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    def to_bytes(self) -> bytes:
        """The bytes up to the values."""
        layout = (
            DTYPES.index(self.dtype)
            | self.kind << 2
            | self.learning.named << 5
            | self.grouped << 6
            | self.negative_zeros << 7
        )
        head = bytes([VERSION, layout]) + b"".join(
            map(varint, (len(self.shape), *self.shape, self.survivors))
        )
        if not self.survivors:
            return head
        rates = self.learning.rows | self.learning.columns << 4
        return (
            head
            + varint(self.levels)
            + bytes([rates])
            + varint(self.alphabet)
            + bytes([self.prior])
            + (varint(self.scales) if self.grouped else b"")
        )


def varint(value: int) -> bytes:
    """Seven bits a byte, the low ones first, the high bit set on all but the last."""
    parts = []
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def sealed(body: bytes, content: bytes) -> bytes:
    """A block with its two checks."""
    whole = body + (zlib.crc32(content) & 0xFFFF).to_bytes(2, "little")
    return whole + zlib.crc32(whole).to_bytes(4, "little")


def content_check(block: bytes) -> int:
    """The 16 bits that the tensor's own check must have."""
    return int.from_bytes(block[-6:-4], "little")


def read_header(block: bytes, name: str) -> tuple[Header, bytes, bytes]:
    """Header, value bytes and stream of a block.

    Raises `InvalidModelError` naming the tensor when the block is damaged, of another version, or describes
    what cannot be.
    """
    try:
        if len(block) < 4 + _CHECK or zlib.crc32(block[:-4]) != int.from_bytes(block[-4:], "little"):
            raise InvalidModelError(f"its {len(block)} bytes fail their checksum")
        if block[0] != VERSION:
            raise InvalidModelError(f"it is of version {block[0]}, and this tdpass reads version {VERSION}")
        header, offset = _parse(block)
        _check(header, len(block))
        size = (
            data_size(header.kind, header.survivors, header.alphabet, header.scales, header.dtype.itemsize)
            if header.survivors
            else 0
        )
        if offset + size > len(block) - _CHECK:
            raise InvalidModelError(
                f"its values take {size} bytes, and {len(block) - _CHECK - offset} are left"
            )
    except InvalidModelError as error:
        raise InvalidModelError(
            f"the packed tensor {name!r} is damaged: {error}; write the file again with Artifact.save"
        ) from None
    except (IndexError, ValueError):
        raise InvalidModelError(
            f"the packed tensor {name!r} is damaged: its header is cut off; write the file again with "
            "Artifact.save"
        ) from None
    return header, block[offset : offset + size], block[offset + size : -_CHECK]


def _parse(block: bytes) -> tuple[Header, int]:
    layout, body = block[1], block[:-_CHECK]
    axes, offset = _varint(body, 2)
    if axes > MOST_AXES:
        raise InvalidModelError(f"it has {axes} axes; up to {MOST_AXES} are possible")
    shape = []
    for _ in range(axes):
        size, offset = _varint(body, offset)
        shape.append(size)
    survivors, offset = _varint(body, offset)
    fixed = (DTYPES[layout & 3], tuple(shape), survivors)
    if not survivors:
        return Header(*fixed, negative_zeros=bool(layout >> 7)), offset
    levels, offset = _varint(body, offset)
    rates = body[offset]
    alphabet, offset = _varint(body, offset + 1)
    prior, scales, offset = body[offset], 1, offset + 1
    if layout >> 6 & 1:
        scales, offset = _varint(body, offset)
    learning = Learning(rates & 15, rates >> 4, bool(layout >> 5 & 1))
    return Header(
        *fixed,
        levels,
        bool(layout >> 7),
        learning,
        Kind(layout >> 2 & 7),
        bool(layout >> 6 & 1),
        alphabet,
        prior,
        scales,
    ), offset


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        byte = data[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
    raise InvalidModelError("a number in its header runs on")


def _check(header: Header, length: int) -> None:
    elements, most = header.elements, min(MOST_ELEMENTS, PER_BYTE * length)
    if not 1 <= elements <= most:
        raise InvalidModelError(
            f"its shape {header.shape} has {elements} elements; {length} bytes can hold 1 to {most}"
        )
    if header.survivors > elements or header.levels > header.survivors:
        raise InvalidModelError(
            f"it counts {header.survivors} survivors and {header.levels} levels among {elements} elements"
        )
    if max(header.learning.rows, header.learning.columns) >= len(STRENGTHS) or header.prior >= len(PRIORS):
        raise InvalidModelError("its rates are coded in an unknown way")
    if header.grouped and (
        header.kind not in {Kind.MULTIPLES, Kind.WIDE_MULTIPLES} or header.scales > header.survivors
    ):
        raise InvalidModelError(f"it has {header.scales} scales for {header.survivors} survivors")
