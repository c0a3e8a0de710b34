"""Layers whose int8 factors read integers, as one chain: `linear_chain_int8` or `conv_chain_int8`.

`integer_chain` calls it by the codes, scales and ranges as the layer stores them; what is packed of them is
looked up by identity when it runs, so that exported programs hold what is stored alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from tdpass.form import STATIC
from tdpass.formats.layer import Layer
from tdpass.formats.lowering import chain_of
from tdpass.kernels.base import NAMESPACE
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_chain import CONV_CHAIN_INT8, LINEAR_CHAIN_INT8, empty_output
from tdpass.kernels.int8_factor import MOST_PRODUCTS, columns, pack_codes
from tdpass.kernels.stage import stages_of, widths_of
from tdpass.layers.derived import Recipe, derived
from tdpass.layers.encoded import EncodedChain

NAME = "integer_chain"
_SCHEMA = (
    "(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] ranges, Tensor? bias, int[] stages, bool linear)"
    " -> Tensor"
)


@dataclass(frozen=True)
class PackIntegers(Recipe):
    """Packed weights, scales and totals of a chain, and the numbers of its grids, as the operator takes them.

    Reads the codes of all stages, then their scales, then the ranges of what they read, none where every row
    finds its own.
    """

    stages: tuple[int, ...]

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        chain = stages_of(self.stages)
        count = len(chain)
        codes, scales, ranges = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        factors = [
            pack_codes(stage, each.reshape(stage.shape), scale)
            for stage, each, scale in zip(chain, codes, scales, strict=True)
        ]
        reads = [Grid(*each.tolist()) for each in ranges] or [Grid()] * count
        grids = torch.tensor(Grids(tuple(reads)).numbers(), dtype=torch.float64)
        return (*(part.clone() for parts in columns(factors) for part in parts), grids)


def run(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    ranges: Sequence[Tensor],
    bias: Tensor | None,
    stages: Sequence[int],
    linear: bool,
) -> Tensor:
    """The chain: convolutions on images and signals, or linear layers on the last axis of x."""
    *parts, grids = derived(PackIntegers(tuple(stages)), (*codes, *scales, *ranges))
    count = len(codes)
    factors = parts[:count], parts[count : 2 * count], parts[2 * count :]
    numbers = grids.tolist()
    if linear:
        return LINEAR_CHAIN_INT8.call(  # type: ignore[no-any-return]
            x, *factors, bias, None, numbers, widths_of(stages_of(stages)), "identity"
        )
    flat = x.dim() == 3
    image = x.unsqueeze(2) if flat else x
    y: Tensor = CONV_CHAIN_INT8.call(image, *factors, bias, None, numbers, stages, "identity")
    return y.squeeze(2) if flat else y


def fake(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    ranges: Sequence[Tensor],
    bias: Tensor | None,
    stages: Sequence[int],
    linear: bool,
) -> Tensor:
    """Shape and strides."""
    del codes, scales, ranges, bias
    chain = stages_of(stages)
    if linear:
        return x.new_empty((*x.shape[:-1], chain[-1].outputs))
    flat = x.dim() == 3
    y = empty_output(x.unsqueeze(2) if flat else x, chain, x.dtype)
    return y.squeeze(2) if flat else y


class IntegerChain(EncodedChain):
    """A layer of int8 factors that read integers, as one chain in whole numbers.

    Between its factors codes stay in the cache, and are never written as floating-point numbers where their
    ranges are stored.  A code may differ by one step from that of the layer as it is, which divides by a
    scale where the kernel multiplies with its inverse.
    """

    operator = NAME

    @staticmethod
    def why_not(layer: Layer) -> str:
        lowered = chain_of(layer)
        if lowered is None:
            return f"'{layer.form}' is no chain of convolutions or linear layers"
        if lowered.axes and layer.form.activations != STATIC:
            return f"'{layer.form}' has no ranges for what its convolutions read"
        if not set(lowered.factors) <= set(layer.storage.integer_factors):
            return f"'{layer.form}' holds factors that are no int8 with one scale for each row"
        if any(math.prod(stage.shape[1:]) > MOST_PRODUCTS for stage in lowered.stages):
            return f"'{layer.form}' sums more than {MOST_PRODUCTS} products, which may exceed 32 bits"
        return ""

    def chain_call(self, x: Tensor) -> Tensor:
        names, storage = self.lowered.factors, self.storage
        stored = [[*names], [*map(storage.scale_of, names)], [*map(storage.range_of, names)]]
        if self.form.activations != STATIC:
            stored[2] = []
        held = [[self._buffers[name] for name in part] for part in stored]
        y: Tensor = torch.ops.tdpass.integer_chain(
            x, *held, self.bias, self.lowered.integers, self.lowered.linear
        )
        return y


_LIBRARY: Any = Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(NAME + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl(NAME, run, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::{NAME}", fake, lib=_LIBRARY)
