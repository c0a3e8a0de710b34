"""A weight that is mostly zeros, as a list of blocks per panel of outputs.

A block is the weights of `width` outputs for one input. Pruned channels and rows leave blocks of 16 and 8
full; scattered zeros are best left out one by one, `width` 1, or in fours.  The thin matrices of a product
that is added, `S + U V`, are full panels beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError

# Cycles per block and 16 positions, as measured; half of one per weight is what the multiply-adds take.
CYCLES = {16: 8.8, 8: 4.6, 4: 2.5, 1: 1.1}
# The same of all of fewer than 16 positions: reading the weights is what takes time.
_FEW_CYCLES = {16: 16.0, 8: 8.0, 4: 5.3, 1: 4.7}
_VECTOR = 16
_THIN = 8  # outputs of a panel of a thin matrix
# Inputs per segment of single weights, and how many weights of an output it should hold on average.
_SEGMENT, _FEWEST = 64, 8


class Blocks(NamedTuple):
    """A packed weight: `values[e]` weigh input `inputs[e]` for the outputs `rows[width p :][: width]`.

    Inputs are counted as columns of `weight.flatten(1)` and cut into segments; blocks `start[k]` up to
    `start[k + 1]` belong to panel p in segment s, k = s panels + p.  A row of -1 is no output.  Outputs
    without weights come last, where they cost nothing.
    """

    values: Tensor
    inputs: Tensor
    start: Tensor
    rows: Tensor

    @property
    def width(self) -> int:
        """Outputs per panel."""
        return self.values.shape[1]

    @property
    def panels(self) -> int:
        """Groups of outputs."""
        return len(self.rows) // self.width

    def cycles(self, positions: int = _VECTOR) -> float:
        """Estimated cycles for that many positions."""
        return len(self.values) * (
            _FEW_CYCLES[self.width] if positions < _VECTOR else CYCLES[self.width] * positions / _VECTOR
        )


def pack(weight: Tensor, width: int | None = None, positions: int = _VECTOR) -> Blocks:
    """`weight[o, i, ...]` without its zeros, float32.

    The width of blocks is 16, 8, 4 or 1, by default the fastest for so many positions.
    """
    flat, taps = weight.detach().float().flatten(1), math.prod(weight.shape[2:])
    if width is None:
        return min((_pack(flat, each, taps) for each in CYCLES), key=lambda blocks: blocks.cycles(positions))
    if width not in CYCLES:
        raise KernelError(
            f"blocks of {width} outputs are not known; the width is one of {', '.join(map(str, CYCLES))}"
        )
    return _pack(flat, width, taps)


def _pack(flat: Tensor, width: int, taps: int) -> Blocks:
    order = torch.arange(len(flat))
    if width > 1:
        order = order[(flat == 0).all(1).int().sort(stable=True).indices]
    rows = F.pad(order, (0, -len(order) % width), value=-1)
    panels = F.pad(flat[order], (0, 0, 0, len(rows) - len(order))).reshape(-1, width, flat.shape[1])
    stored = (panels != 0).any(1)
    size = flat.shape[1]
    if width == 1:
        size = max(_SEGMENT * min(taps, 3), math.ceil(_FEWEST / max(float(stored.float().mean()), 1e-9)))
    parts = [(k, stored[:, k : k + size], panels.mT[:, k : k + size]) for k in range(0, flat.shape[1], size)]
    found = [(mask.sum(1), mask.nonzero()[:, 1] + k, part[mask]) for k, mask, part in parts]
    counts, inputs, values = (torch.cat(each) for each in zip(*found, strict=True))
    start = F.pad(counts.cumsum(0), (1, 0))
    return Blocks(values.contiguous(), inputs.int(), start.int(), rows.int())


def check(blocks: Blocks, shape: Sequence[int]) -> None:
    """Raise `KernelError` unless the blocks lie within a weight of that shape and make every output once."""
    values, inputs, start, rows = blocks
    parts = (
        f"blocks of shape {tuple(values.shape)} with {inputs.numel()} inputs, {start.numel()} starts, "
        f"{rows.numel()} rows"
    )
    if (
        values.dim() != 2
        or values.shape[1] not in CYCLES
        or any(part.dim() != 1 or part.is_floating_point() for part in blocks[1:])
    ):
        raise KernelError(f"{parts} are no sparse weight; use what `pack` returns")
    panels = len(rows) // values.shape[1]
    places = (
        bool(panels)
        and len(rows) == panels * values.shape[1]
        and len(start) > 1
        and (len(start) - 1) % panels == 0
    )
    if (
        not places
        or len(inputs) != len(values)
        or int(start[0]) != 0
        or int(start[-1]) != len(values)
        or bool((start.diff() < 0).any())
    ):
        raise KernelError(f"{parts} do not fit each other; use what `pack` returns")
    if bool(((inputs < 0) | (inputs >= math.prod(shape[1:]))).any()):
        raise KernelError(
            f"inputs from {int(inputs.min())} to {int(inputs.max())} lie outside a weight of shape "
            f"{tuple(shape)}; use what `pack` returns"
        )
    made = rows[rows != -1].long()
    if len(made) != shape[0] or not torch.equal(
        made.sort().values, torch.arange(shape[0], device=made.device)
    ):
        raise KernelError(
            f"the rows of the blocks are not the {shape[0]} outputs, each of them once; use what `pack` "
            "returns"
        )


def unpack(blocks: Blocks, shape: Sequence[int]) -> Tensor:
    """The dense weight of that shape; raises `KernelError` as `check` does."""
    check(blocks, shape)
    outputs, width = shape[0], blocks.width
    counts = blocks.start.diff().long()
    panel = (torch.arange(len(counts), device=counts.device) % blocks.panels).repeat_interleave(counts)
    dense = blocks.values.new_zeros((blocks.panels, math.prod(shape[1:]), width))
    dense = dense.index_put((panel, blocks.inputs.long()), blocks.values, accumulate=True).mT
    kept = blocks.rows >= 0
    weight = blocks.values.new_zeros((outputs, dense.shape[2]))
    weight[blocks.rows[kept].long()] = dense.flatten(0, 1)[kept]
    return weight.reshape(tuple(shape))


def pack_thin(v: Tensor, u: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """`v[r, i, ...]` and `u[o, r]` of a product that is added to these blocks, float32.

    Panels of eight, `[ceil(r / 8), inputs, 8]` and `[ceil(rows / 8), r, 8]`, the latter in the order of the
    blocks' rows, those of no output zero.
    """
    ordered = F.pad(u.detach().flatten(1), (0, 0, 0, 1))[blocks.rows.long()]
    return _full_panels(v.detach().flatten(1)), _full_panels(ordered)


def _full_panels(matrix: Tensor) -> Tensor:
    padded = F.pad(matrix.float(), (0, 0, 0, -len(matrix) % _THIN))
    return padded.reshape(-1, _THIN, matrix.shape[1]).mT.contiguous()


def fit_thin(v: Tensor | None, u: Tensor | None, blocks: Blocks, inputs: int) -> bool:
    """Whether they are missing, or what `pack_thin` makes for blocks that read so many inputs."""
    if v is None or u is None:
        return v is u
    rank = u.shape[1] if u.dim() == 3 else 0
    shapes = (math.ceil(rank / _THIN), inputs, _THIN), (math.ceil(len(blocks.rows) / _THIN), rank, _THIN)
    return rank > 0 and (tuple(v.shape), tuple(u.shape)) == shapes


def unpack_sum(blocks: Blocks, v: Tensor | None, u: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The dense weight `S + U V` of that shape; raises `KernelError` for parts that do not fit each other."""
    weight = unpack(blocks, shape)
    if not fit_thin(v, u, blocks, math.prod(shape[1:])):
        parts = " and ".join("none" if each is None else str(tuple(each.shape)) for each in (v, u))
        raise KernelError(
            f"thin matrices of shape {parts} do not fit blocks of {len(blocks.rows)} rows; use what "
            "`pack_thin` returns"
        )
    if v is None or u is None:
        return weight
    first, last = (panels.mT.flatten(0, 1).to(weight.dtype) for panels in (v, u))
    rows, kept = blocks.rows.long(), blocks.rows >= 0
    product = last[: len(rows)] @ first[: u.shape[1]]
    return weight.flatten(1).index_add(0, rows[kept], product[kept]).reshape(tuple(shape))
