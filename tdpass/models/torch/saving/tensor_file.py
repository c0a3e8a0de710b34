"""Safetensors files that carry a digest over all that is in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tdpass.digest import digest
from tdpass.errors import InvalidModelError
from tdpass.files import replacing

_DIGEST = "tdpass.digest"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, to a temporary name first, with a digest of all of it for `check_digest`."""
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    described = {**metadata, _DIGEST: _digest(held.items(), metadata)}
    with replacing(path) as temporary:
        save_file(held, temporary, metadata=described)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises `InvalidModelError` when it is missing, damaged or not one.
    """
    if not path.is_file():
        raise InvalidModelError(
            f"there is no file {path}; give the .safetensors file that `Artifact.save` wrote"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InvalidModelError(
            f"{path} is not an intact safetensors file ({error}); write it again with Artifact.save"
        ) from None


def check_digest(path: Path) -> dict[str, str]:
    """The metadata of a file whose digest, where it has one, is that of its content.

    Raises `InvalidModelError` for another.
    """
    metadata = read_metadata(path)
    if _DIGEST in metadata:
        with safe_open(path, framework="pt") as file:
            # what safetensors opens is no dict
            found = _digest(((name, file.get_tensor(name)) for name in file.keys()), metadata)  # noqa: SIM118
        if found != metadata[_DIGEST]:
            raise InvalidModelError(
                f"{path} is damaged: its content is not what was written; write the file again with "
                "Artifact.save"
            )
    return metadata


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str]) -> str:
    """Over names, types, shapes and bytes of all tensors, and over all other metadata.

    One tensor at a time is in memory.
    """
    texts = [text for name in sorted(metadata) if name != _DIGEST for text in (name, metadata[name])]
    each = sorted(f"{name}:{digest(tensor)}" for name, tensor in tensors)
    return digest(*texts, *each)
