"""Factors in number types of their own as a file may hold them.

Their parts, or the numbers that these stand for, entropy-coded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpass.formats.storage import Storage
from tdpass.layers.factorized import Factorized
from tdpass.numbers import Earlier
from tdpass.ops import TorchOps
from tdpass.packing import pack

Held = tuple[tuple[int, ...], torch.dtype]
_OPS = TorchOps()
_HEADER = 64  # bytes of a block beside its values and their places, at most


def under(path: str, name: str) -> str:
    """The name of a tensor of the module at that path."""
    return f"{path}.{name}" if path else name


@dataclass(frozen=True)
class Coded:
    """A factor of the layer at that path, which a file may hold as the numbers that its parts stand for."""

    path: str
    name: str
    storage: Storage

    @property
    def whole(self) -> Held:
        """Shape and type of these numbers."""
        return tuple(self.storage.shapes[self.name]), torch.float32

    @property
    def parts(self) -> dict[str, Held]:
        """Shapes and types of the parts."""
        return {
            under(self.path, part): (held.shape, held.dtype)
            for part, held in self.storage.parts_of(self.name).items()
        }

    def made(self, factor: Tensor) -> dict[str, Tensor]:
        """The parts of the numbers."""
        return {under(self.path, part): held for part, held in self.storage.stored(self.name, factor).items()}


def coded_factors(
    layers: Iterable[tuple[Sequence[str], Storage]], held: Mapping[str, Held]
) -> dict[str, Coded]:
    """Factors of these layers, given with their paths, that `held` has as numbers, by the name of those."""
    each = [
        Coded(path, name, storage) for paths, storage in layers for path in paths for name in storage.numbers
    ]
    named = {under(coded.path, coded.name): coded for coded in each}
    return {
        name: coded
        for name, coded in named.items()
        if held.get(name) == coded.whole and coded.parts.get(name) != coded.whole
    }


def earlier_parts(
    layers: Iterable[tuple[Sequence[str], Storage]], held: Mapping[str, Held]
) -> dict[str, Earlier]:
    """Parts of these layers, given with their paths, that `held` has as earlier versions stored them."""
    each = [
        (under(path, part), found)
        for paths, storage in layers
        for path in paths
        for part, found in storage.earlier.items()
    ]
    return {name: found for name, found in each if held.get(name) == (found.part.shape, found.part.dtype)}


def with_coded_factors(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors, with a factor's numbers in place of its parts where they have a smaller block.

    Only where the parts that are made of them anew stand for the same numbers.  Of a factor with a support
    the block may be larger by what it says of itself: survivors and levels of a file are counted from its
    blocks, and small layers belong to that.
    """
    found = dict(tensors)
    for path, layer in module.named_modules():
        for name in layer.storage.numbers if isinstance(layer, Factorized) else ():
            assert isinstance(layer, Factorized)
            keys = {under(path, part): part for part in layer.storage.parts_of(name)}
            if not keys.keys() <= tensors.keys():  # they are shared with a layer that comes first
                continue
            exact = layer.storage.restored(
                _OPS, name, {part: tensors[key] for key, part in keys.items()}, torch.float64
            )
            block = pack(exact.float())
            room = _HEADER if name in layer.storage.supports else 0
            if block is None or len(block) >= sum(tensors[key].nbytes for key in keys) + room:
                continue
            if torch.equal(
                layer.storage.restored(_OPS, name, layer.storage.stored(name, exact.float()), torch.float64),
                exact,
            ):
                found = {key: tensor for key, tensor in found.items() if key not in keys} | {
                    under(path, name): exact.float()
                }
    return found
