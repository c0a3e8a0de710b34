"""A folder of images: one sub-folder per class, or `train` and `test` with these in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tdpass.datasets.base import Dataset, Examples, Source, measured, register_source
from tdpass.errors import UsageError
from tdpass.images import image_files, opened, stacked

_TEST = ("test", "val", "valid", "validation")


@register_source
class ImageFolder(Source):
    """A folder of images by class; without a test folder a fifth of them is held back."""

    name = "folder"
    example = "a folder of images"

    def claims(self, text: str) -> bool:
        return Path(text).is_dir()

    def open(self, text: str) -> Dataset:
        folder = Path(text)
        train, test = (
            folder / "train",
            next((folder / name for name in _TEST if (folder / name).is_dir()), None),
        )
        if not train.is_dir() or test is None:
            return measured(text, _read(folder, _classes(folder)))
        classes = _classes(train)
        training = _read(train, classes)
        height, width = training.inputs.shape[2:]
        return measured(text, training, _read(test, classes, (height, width)))


def _classes(folder: Path) -> list[str]:
    found = sorted(place.name for place in folder.iterdir() if place.is_dir() and image_files(place))
    if len(found) < 2:
        raise UsageError(
            f"{folder} has images of {len(found)} classes; give a folder with a sub-folder of images per "
            "class, at least two"
        )
    return found


def _read(folder: Path, classes: Sequence[str], size: tuple[int, int] | None = None) -> Examples:
    files = [(file, label) for label, name in enumerate(classes) for file in image_files(folder / name)]
    images = stacked(opened([file for file, _ in files]), str(folder), size)
    return Examples(images, torch.tensor([label for _, label in files]))
