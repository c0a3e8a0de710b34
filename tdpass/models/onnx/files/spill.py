"""Factors that wait for `save` in a temporary file instead of in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from tdpass.formats.layer import Layer
from tdpass.models.onnx.files.storage import map_file, release_heap
from tdpass.models.onnx.graph.tensors import from_memory

HELD_BYTES = 64 * 2**20
_ALIGNMENT = 64


class HeldLayers(dict[str, Layer]):
    """Layers by site; once those in memory are many, they are moved to a file.

    Small models never have so many.
    """

    def __init__(self, layers: Mapping[str, Layer] | None = None, waiting: Iterable[str] = ()) -> None:
        super().__init__(layers or {})
        self._waiting = set(waiting)

    def put(self, name: str, layer: Layer) -> None:
        """Hold a layer."""
        self[name] = layer
        self._waiting.add(name)
        waiting = {name: self[name] for name in self._waiting}
        if held_bytes(waiting) > HELD_BYTES:
            self.update(spilled(waiting))
            self._waiting.clear()
            del waiting, layer
            release_heap()

    def drop(self, names: Iterable[str]) -> None:
        """Hold these no longer."""
        for name in names:
            del self[name]
            self._waiting.discard(name)

    def copy(self) -> HeldLayers:
        """The same layers, held independently."""
        return HeldLayers(self, self._waiting)


def held_bytes(layers: Mapping[str, Layer]) -> int:
    """Bytes of all factors."""
    return sum(factor.nbytes for layer in layers.values() for factor in layer.factors.values())


def spilled(layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
    """The same layers with their factors mapped from one temporary file; unchanged where none can be written.

    The file has no name: the system frees its space once no factor is left, however the process ends.
    """
    try:
        with tempfile.TemporaryFile(prefix="tdpass-") as file:
            places = iter(
                [_append(file, factor) for layer in layers.values() for factor in layer.factors.values()]
            )
            file.flush()
            mapped = np.frombuffer(map_file(file.fileno(), file.tell()), np.uint8)
    except OSError:  # a full disk, or no file left to open: memory will have to do
        return layers
    moved: dict[str, Layer] = {}
    for name, layer in layers.items():
        moved[name] = replace(
            layer,
            factors={label: _at(mapped, next(places), factor) for label, factor in layer.factors.items()},
        )
    return moved


def _append(file: BinaryIO, factor: Tensor) -> int:
    """Write a factor at the next aligned place, which is returned."""
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    place = file.tell()
    file.write(factor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return place


def _at(mapped: np.ndarray, place: int, like: Tensor) -> Tensor:
    return from_memory(mapped[place : place + like.nbytes]).view(like.dtype).reshape(like.shape)
