"""Linear layers whose weight is whole numbers or float8, alone or beside a thin product, as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.formats.storage import Storage
from tdpass.kernels.weight_only import WEIGHT_ONLY_LINEAR, pack_codes, pack_float8, pack_floats
from tdpass.layers.derived import Recipe, Tensors, derived
from tdpass.layers.one_operator import OneOperator
from tdpass.layers.tracing import is_traced
from tdpass.numbers import SCALE, VALUES
from tdpass.numbers.floating import Floating
from tdpass.numbers.levels import TABLE, Levels
from tdpass.numbers.scaled import ZERO, Scaled
from tdpass.ops import TorchOps
from tdpass.site import Site

_EIGHTH = 8  # groups of the operator are multiples of so many inputs


def _names(layer: Layer) -> tuple[str, ...]:
    """Q, then V and U where there is a product."""
    remainder = FORMATS.get(layer.format).remainder
    return (remainder, "v", "u") if remainder else tuple(layer.storage.shapes)[:1]


@dataclass(frozen=True)
class PackWeightOnly(Recipe[Tensors]):
    """Codes and scales of every matrix of a layer, in turn, as the operator takes them."""

    site: Site
    form: Form
    names: tuple[str, ...]

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        held = dict(zip(self.names, tensors, strict=True))
        layer = Layer(self.site, self.form, held)
        whole, *thin = _names(layer)
        storage = layer.storage
        floats = (storage.restored(TorchOps(), name, held, torch.float32) for name in thin)
        packed = [_pack(storage, whole, held), *(pack_floats(each, torch.float32) for each in floats)]
        return tuple(tensor for each in packed for tensor in each)


def _pack(storage: Storage, name: str, held: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    numbers, (outputs, inputs) = storage.numbers[name], storage.shapes[name]
    codes = numbers.unpacked(TorchOps(), held[storage.part_of(name, VALUES)], outputs * inputs)
    parts = {part: held[storage.part_of(name, part)] for part in numbers.parts(storage.shapes[name])}
    if isinstance(numbers, Levels):
        return _pack_levels(numbers, codes.reshape(outputs, inputs).long(), parts[TABLE])
    assert isinstance(numbers, Scaled)
    beside = numbers.unpacked_beside(TorchOps(), parts, storage.shapes[name])
    each = {part: held.expand(outputs) if numbers.group < 0 else held for part, held in beside.items()}
    rows = {part: held.reshape(outputs, -1) for part, held in each.items()}
    whole = codes.reshape(outputs, inputs)
    if numbers.floating:
        return pack_float8(whole, rows[SCALE])
    return pack_codes(whole.to(torch.int8), rows[SCALE], numbers.bits, rows.get(ZERO))


def _pack_levels(numbers: Levels, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Levels that are multiples of a step as whole numbers, others as the numbers that they are."""
    found = numbers.multiples(table)
    if found is None:
        return pack_floats(table[codes], torch.float32)
    whole, step = found
    bits = 4 if int(whole.abs().max()) < _EIGHTH else 8
    return pack_codes(whole.to(codes.device)[codes], step.expand(len(codes), 1), bits)


class WeightOnly(OneOperator):
    """A linear layer of numbers of few bits that runs as `weight_only_linear`, from what is packed of them.

    Where gradients are wanted, while it is compiled or exported, and for other types than single precision it
    runs as the layer that it is.
    """

    operator = "weight_only_linear"

    @staticmethod
    def why_not(layer: Layer) -> str:
        whole, *thin = _names(layer)
        numbers = layer.storage.numbers.get(whole)
        if layer.site.axes or layer.site.groups > 1 or layer.format not in ("dense", "svd_residual"):
            return f"'{layer.form}' is no linear layer of one matrix, alone or beside a product of two"
        scaled = isinstance(numbers, Scaled) and numbers.bits in (4, 8)
        if not scaled and not isinstance(numbers, Levels):
            return f"'{layer.form}' holds no levels, and no numbers of 4 or 8 bits with scales"
        if (
            layer.storage.supports
            or layer.form.activations
            or (isinstance(numbers, Scaled) and numbers.group > 0 and numbers.group % _EIGHTH)
        ):
            return (
                f"'{layer.form}' has a support, integer activations or groups that are no multiples of "
                f"{_EIGHTH}"
            )
        if not all(isinstance(layer.storage.numbers.get(name), Floating) for name in thin):
            return f"'{layer.form}' holds no floating-point factors beside its numbers of few bits"
        return ""

    def packed(self) -> Tensors:
        """Codes and scales of every matrix, in turn, as the operator takes them."""
        held = self.factors()
        return derived(PackWeightOnly(self.site, self.form, tuple(held)), tuple(held.values()))

    @property
    def widths(self) -> list[int]:
        """Channels read, made, and between the two matrices of a product."""
        return [self.site.i, self.site.o, *self.rank]

    def packed_call(self, x: Tensor) -> Tensor:
        packed = self.packed()
        y: Tensor = WEIGHT_ONLY_LINEAR.call(
            x, list(packed[::2]), list(packed[1::2]), self.bias, None, self.widths, self.activation
        )
        return y

    def serves(self, x: Tensor) -> bool:
        return x.dtype is torch.float32 and not is_traced(x)
