"""Layers whose int8 factors read integers, as one chain: `linear_chain_int8` or `conv_chain_int8`.

`integer_chain` calls it by the codes, scales and ranges as the layer stores them; what is packed of them, and
the numbers of the grids, are looked up by identity when it runs, so that compiled and exported programs hold
what is stored alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library

from tdpass.form import STATIC
from tdpass.formats.layer import Layer
from tdpass.formats.lowering import chain_of
from tdpass.kernels.base import NAMESPACE
from tdpass.kernels.flops import conv_macs, count_products, linear_macs, of_arguments
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_chain import CONV_CHAIN_INT8, LINEAR_CHAIN_INT8, empty_output
from tdpass.kernels.int8_factor import MOST_PRODUCTS, columns, pack_codes
from tdpass.kernels.stage import stages_of, widths_of
from tdpass.layers.derived import Recipe, derived
from tdpass.layers.one_operator import EncodedChain

NAME = "integer_chain"
_SCHEMA = (
    "(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] ranges, Tensor? bias, int[] stages, bool linear, "
    "str activation, Tensor? residual=None, Tensor? output_range=None, Tensor? residual_range=None) -> Tensor"
)


@dataclass(frozen=True)
class PackedIntegers:
    """A chain as its operator takes it.

    It has packed weights, scales and totals of its stages, and the numbers of its grids.
    """

    weights: list[Tensor]
    scales: list[Tensor]
    totals: list[Tensor]
    grids: list[float]
    stages: list[int]
    widths: list[int]

    def arguments(
        self, x: Any, bias: Any, residual: Any, activation: str, *, linear: bool
    ) -> tuple[Any, ...]:
        """What its operator is called with, on an image or on rows of channels."""
        sizes = self.widths if linear else self.stages
        return x, self.weights, self.scales, self.totals, bias, residual, self.grids, sizes, activation

    def __call__(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, *, linear: bool
    ) -> Tensor:
        """Convolutions on images and signals, or linear layers on the last axis of x."""
        operator = LINEAR_CHAIN_INT8 if linear else CONV_CHAIN_INT8
        if linear or x.dim() != 3:
            made: Tensor = operator.call(*self.arguments(x, bias, residual, activation, linear=linear))
            return made
        rest = None if residual is None else residual.unsqueeze(2)
        return self(x.unsqueeze(2), bias, rest, activation, linear=False).squeeze(2)


@dataclass(frozen=True)
class PackIntegers(Recipe[PackedIntegers]):
    """Packs the codes of all stages, their scales, and the ranges of what they read.

    There are none where every row finds its own. Then come the range that the output is rounded to, with
    `output`, and that of a residual of bytes, with `residual`.
    """

    stages: tuple[int, ...]
    output: bool = False
    residual: bool = False

    def make(self, tensors: Sequence[Tensor]) -> PackedIntegers:
        chain = stages_of(self.stages)
        count, ends = len(chain), self.output + self.residual
        codes, scales = tensors[:count], tensors[count : 2 * count]
        factors = [
            pack_codes(stage, each.reshape(stage.shape), scale)
            for stage, each, scale in zip(chain, codes, scales, strict=True)
        ]
        grids = iter([Grid(*each.tolist()) for each in tensors[2 * count :]])
        reads = (
            tuple(next(grids) for _ in range(count)) if len(tensors) > 2 * count + ends else (Grid(),) * count
        )
        output = next(grids) if self.output else Grid()
        numbers = Grids(reads, output, next(grids, Grid())).numbers()
        weights, scales, totals = ([part.clone() for part in parts] for parts in columns(factors))
        return PackedIntegers(weights, scales, totals, numbers, list(self.stages), widths_of(chain))


def run(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    ranges: Sequence[Tensor],
    bias: Tensor | None,
    stages: Sequence[int],
    linear: bool,
    activation: str,
    residual: Tensor | None = None,
    output_range: Tensor | None = None,
    residual_range: Tensor | None = None,
) -> Tensor:
    """`activation(chain(x) + bias + residual)`: convolutions, or linear layers on the last axis of x.

    Convolutions are of images and signals. With ranges of them, the output and the residual are bytes; x may
    be bytes in the range that the first stage reads.
    """
    recipe = PackIntegers(tuple(stages), output_range is not None, residual_range is not None)
    ends = (each for each in (output_range, residual_range) if each is not None)
    packed = derived(recipe, (*codes, *scales, *ranges, *ends))
    return packed(x, bias, residual, activation, linear=linear)


def fake(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    ranges: Sequence[Tensor],
    bias: Tensor | None,
    stages: Sequence[int],
    linear: bool,
    activation: str,
    residual: Tensor | None = None,
    output_range: Tensor | None = None,
    residual_range: Tensor | None = None,
) -> Tensor:
    """Shape, type and strides."""
    del codes, scales, ranges, bias, activation, residual, residual_range
    chain = stages_of(stages)
    floating = x.dtype if x.is_floating_point() else torch.float32
    dtype = floating if output_range is None else torch.uint8
    if linear:
        return x.new_empty((*x.shape[:-1], chain[-1].outputs), dtype=dtype)
    flat = x.dim() == 3
    y = empty_output(x.unsqueeze(2) if flat else x, chain, dtype)
    return y.squeeze(2) if flat else y


def _macs(x: Tensor, stages: Sequence[int], linear: bool) -> int:
    """Multiply-adds."""
    return linear_macs(x, widths_of(stages_of(stages))) if linear else conv_macs(x, stages)


class IntegerChain(EncodedChain):
    """A layer of int8 factors that read integers, as one chain in whole numbers.

    Between its factors codes stay in the cache, and are never written as floating-point numbers where their
    ranges are stored.  A code may differ by one step from that of the layer as it is, which divides by a
    scale where the kernel multiplies with its inverse.
    """

    operator = NAME

    def __init__(
        self, layer: Layer, bias: nn.Parameter | None, padding_mode: str = "zeros", pads: tuple[int, ...] = ()
    ) -> None:
        super().__init__(layer, bias, padding_mode, pads)
        names, storage = self.lowered.factors, self.storage
        ranges = map(storage.range_of, names) if self.form.activations == STATIC else ()
        self._parts = (names, tuple(map(storage.scale_of, names)), tuple(ranges))
        self._recipe = PackIntegers(tuple(self.lowered.integers))

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

    def codes_and_scales(self) -> list[Tensor]:
        """The codes of all stages, then their scales."""
        return [self.get_buffer(name) for part in self._parts[:2] for name in part]

    def chain_call(self, x: Tensor) -> Tensor:
        held = [[self._buffers[name] for name in part] for part in self._parts]
        if torch.compiler.is_compiling():
            y: Tensor = INTEGER_CHAIN(
                x, *held, self.bias, self.lowered.integers, self.lowered.linear, self.activation
            )
            return y
        packed = derived(self._recipe, [value for part in held for value in part if value is not None])
        return packed(x, self.bias, None, self.activation, linear=self.lowered.linear)


_LIBRARY: Any = Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(NAME + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl(NAME, run, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::{NAME}", fake, lib=_LIBRARY)
count_products(NAME, of_arguments(_SCHEMA, _macs, "x", "stages", "linear"))
INTEGER_CHAIN: Any = torch.ops.tdpass.integer_chain.default
