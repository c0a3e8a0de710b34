"""Pruned and quantized tensors as few bytes, without loss.

`pack` turns a floating-point tensor into one self-describing block of bytes where that pays, and `unpack`
gives back the same bits: 0.0 and -0.0 are told apart, infinite and NaN tensors are left alone.  What it does
is read off the content alone.

Block, all integers little-endian, `varint` seven bits a byte with the low ones first:

    version   byte, 1
    layout    byte: dtype (2 bits), kind of values (3), empty rows and columns named (1), a scale per row (1),
              -0.0 present (1)
    shape     varint axes, varint sizes
    survivors varint: elements that are neither 0.0 nor -0.0
    levels    varint: distinct values among them, 0 when raw
    learning  byte: how fast rates follow the rows (low 4 bits) and the columns (high 4 bits)
    alphabet  varint: size of the index alphabet;  prior: byte
    values    raw: low bytes of the survivors;  table: varint entries, their bits;  grid: varint scales, the
              scales
    stream    32-bit words of one range coder: positions, signs of zeros, indices, signs
    checks    16 bits of the CRC-32 of the tensor, CRC-32 of everything before

Positions are a bitmap with one probability per element, from a stored total and from the counts of its row
and column so far; an entropy-coded bitmap at a constant rate costs what entropy-coded gaps cost.  All
probabilities are 24-bit integers from integer arithmetic, which the coder takes over exactly, so that a block
decodes alike on every machine.
"""

from tdpass.packing.block import pack as pack
from tdpass.packing.block import unpack as unpack
from tdpass.packing.header import Header as Header
from tdpass.packing.header import read_header as read_header
from tdpass.packing.size import StoredSize as StoredSize
from tdpass.packing.size import size_of_blocks as size_of_blocks
from tdpass.packing.size import stored_size as stored_size
from tdpass.packing.state import SUFFIX as SUFFIX
from tdpass.packing.state import blocks_in as blocks_in
from tdpass.packing.state import packed_state as packed_state
from tdpass.packing.state import stored_in as stored_in
