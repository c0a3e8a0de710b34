"""Pictures of any size and mode as one tensor; Pillow reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdpass.errors import InvalidModelError, UsageError
from tdpass.optional import optional

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
COLOUR_MEAN, COLOUR_STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet, which most networks were trained with


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below, in order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def opened(files: Sequence[Path]) -> Iterator[Any]:
    """The files as Pillow images.

    Raises `InvalidModelError` for one that is none, `UsageError` where Pillow is not there.
    """
    library = optional("PIL.Image", "pillow", "reading images")
    for file in files:
        try:
            with library.open(file) as picture:
                picture.load()
                yield picture
        except (OSError, ValueError, SyntaxError) as error:
            raise InvalidModelError(
                f"cannot read the image {file}: {error}; remove it, or write it again"
            ) from None


def stacked(
    pictures: Iterable[Any], name: str, size: tuple[int, int] | None = None, channels: int | None = None
) -> Tensor:
    """Pillow images as bytes `[n, c, h, w]`, of `size` (height, width) and so many channels.

    Otherwise size and channels are those of the first one. Raises `UsageError` where there is none.
    """
    made: list[Tensor] = []
    mode = {1: "L", 3: "RGB", None: ""}[channels]
    for picture in pictures:
        mode = mode or ("L" if picture.mode in ("1", "L", "I", "I;16") else "RGB")
        size = size or (picture.height, picture.width)
        shown = picture.convert(mode)
        shown = shown if (shown.height, shown.width) == size else shown.resize((size[1], size[0]))
        pixels = torch.from_numpy(np.array(shown, dtype=np.uint8))
        made.append(pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1))
    if not made:
        raise UsageError(f"{name!r} holds no image; give one that ends in {', '.join(sorted(SUFFIXES))}")
    return torch.stack(made).contiguous()


def photographs(folder: Path, sample: Sequence[int] | None, most: int) -> Tensor:
    """Up to `most` images of a folder as float32 `[n, c, h, w]`, spread over its files.

    `sample` is what a network reads. Colour images are normalised with the mean and deviation of ImageNet,
    grey ones lie between 0 and 1.  Raises `UsageError`, `InvalidModelError`.
    """
    if sample is not None and (len(sample) != 3 or sample[0] not in (1, 3)):
        raise UsageError(
            f"the model reads inputs of shape {list(sample)}, which are no images; {folder} is a folder: "
            "give an .npz file"
        )
    files = image_files(folder)
    chosen = files[:: max(1, len(files) // most)][:most]
    size = None if sample is None else (sample[1], sample[2])
    pixels = stacked(opened(chosen), str(folder), size, None if sample is None else sample[0]).float() / 255
    if pixels.shape[1] != 3:
        return pixels
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (COLOUR_MEAN, COLOUR_STD))
    return (pixels - mean) / std
