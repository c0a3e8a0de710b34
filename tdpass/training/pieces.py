"""Tensors of one or many processes in safetensors files.

What each process holds, and where that lies in the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdpass.documents import Count, Document, register_document
from tdpass.errors import TrainingError
from tdpass.training.placement import world

_KEY = "tdpass.pieces"
_NAME = "tensors-{}.safetensors"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: `shape` of the whole, where the box begins in it, and the element type."""

    shape: tuple[Count, ...]
    offset: tuple[Count, ...]
    dtype: str


_PIECES = register_document(
    Document(
        "table of tensors", dict[str, Piece], TrainingError, "train from the beginning in another folder"
    )
)


def write_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what this process holds; of copies that several hold, the first process's."""
    held: dict[str, Tensor] = {}
    pieces: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        local, offset, first = _held(tensor)
        if first and (local.numel() or not tensor.numel()):
            held[name] = local.cpu().contiguous().clone()
            pieces[name] = Piece(tuple(tensor.shape), offset, str(tensor.dtype).removeprefix("torch."))
    save_file(held, folder / _NAME.format(world()[0]), metadata={_KEY: _PIECES.text(pieces)})


def read_table(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor that was written there."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for path in _files(folder):
        for name, piece in _pieces(path).items():
            dtype = getattr(torch, piece.dtype, None)
            if not isinstance(dtype, torch.dtype) or found.setdefault(name, (piece.shape, dtype)) != (
                piece.shape,
                dtype,
            ):
                raise TrainingError(
                    f"{path} does not fit the other files of its checkpoint at {name!r}; train from the "
                    "beginning in another folder"
                )
    return found


@torch.no_grad()
def read_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill what this process holds of each tensor.

    Raises `TrainingError` where a part of it was not written.
    """
    wanted = {name: _held(tensor)[:2] for name, tensor in tensors.items()}
    filled = dict.fromkeys(wanted, 0)
    for path in _files(folder):
        pieces = _pieces(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in wanted.keys() & pieces.keys():
                    filled[name] += _fill(*wanted[name], file.get_slice(name), pieces[name].offset)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise TrainingError(
                f"cannot read {path}: {error}; train from the beginning in another folder"
            ) from None
    for name, (local, _) in wanted.items():
        if filled[name] != local.numel():
            raise TrainingError(
                f"checkpoint {folder} holds {filled[name]} of the {local.numel()} numbers of {name!r}; use "
                "a checkpoint that is whole"
            )


def _fill(local: Tensor, offset: Sequence[int], source: object, begin: Sequence[int]) -> int:
    """Copy where two boxes overlap; returns how many numbers that are."""
    shape: list[int] = source.get_shape()  # type: ignore[attr-defined] # safetensors has no types
    if not shape:
        local.copy_(source[...])  # type: ignore[index]
        return 1
    starts = [max(ours, theirs) for ours, theirs in zip(offset, begin, strict=True)]
    stops = [
        min(ours + size, theirs + length)
        for ours, size, theirs, length in zip(offset, local.shape, begin, shape, strict=True)
    ]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return 0
    ours = tuple(slice(start - at, stop - at) for start, stop, at in zip(starts, stops, offset, strict=True))
    theirs = tuple(slice(start - at, stop - at) for start, stop, at in zip(starts, stops, begin, strict=True))
    local[ours].copy_(source[theirs])  # type: ignore[index]
    return math.prod(stop - start for start, stop in zip(starts, stops, strict=True))


def _held(tensor: Tensor) -> tuple[Tensor, tuple[int, ...], bool]:
    """What this process has of a tensor, where that begins, and whether it is the first with it."""
    rank, size = world()
    if size > 1:
        # takes half a second, and only a process group has such tensors
        from torch.distributed.tensor import DTensor  # noqa: PLC0415
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

        if isinstance(tensor, DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
            places = zip(mesh.get_coordinate() or (), placements, strict=True)
            return (
                tensor.to_local().detach(),
                tuple(offset),
                all(place == 0 for place, placement in places if placement.is_replicate()),
            )
    return tensor.detach(), (0,) * tensor.dim(), rank == 0


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(_NAME.format("*")))


def _pieces(path: Path) -> dict[str, Piece]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY, "")
            # what safetensors opens is no dict
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainingError(
            f"cannot read {path}: {error}; train from the beginning in another folder"
        ) from None
    pieces = _PIECES.parse(text, str(path))
    for name, piece in pieces.items():
        if name not in shapes or not len(piece.shape) == len(piece.offset) == len(shapes[name]):
            raise TrainingError(
                f"{path} does not hold {name!r} as its table says; train from the beginning in another folder"
            )
    return pieces
