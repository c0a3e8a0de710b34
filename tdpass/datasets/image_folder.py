"""A folder of images: one sub-folder per class, or `train` and `test` with these in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tdpass.datasets.base import Dataset, Examples, Source, measured, register_source
from tdpass.datasets.images import as_examples
from tdpass.datasets.optional import optional
from tdpass.errors import InvalidModelError, UsageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_TEST = ("test", "val", "valid", "validation")


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below, in order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def opened(files: Sequence[Path]) -> Iterator[Any]:
    """The files as Pillow images; raises `InvalidModelError` for one that is none, `UsageError` where Pillow is not there."""
    library = optional("PIL.Image", "pillow", "reading images")
    for file in files:
        try:
            with library.open(file) as picture:
                picture.load()
                yield picture
        except (OSError, ValueError, SyntaxError) as error:
            raise InvalidModelError(f"cannot read the image {file}: {error}; remove it, or write it again") from None


@register_source
class ImageFolder(Source):
    """A folder of images by class; without a test folder a fifth of them is held back."""

    name = "folder"
    example = "a folder of images"

    def claims(self, text: str) -> bool:
        return Path(text).is_dir()

    def open(self, text: str) -> Dataset:
        folder = Path(text)
        train, test = folder / "train", next((folder / name for name in _TEST if (folder / name).is_dir()), None)
        if not train.is_dir() or test is None:
            return measured(text, _read(folder, _classes(folder)))
        classes = _classes(train)
        training = _read(train, classes)
        height, width = training.inputs.shape[2:]
        return measured(text, training, _read(test, classes, (height, width)))


def _classes(folder: Path) -> list[str]:
    found = sorted(place.name for place in folder.iterdir() if place.is_dir() and image_files(place))
    if len(found) < 2:
        raise UsageError(f"{folder} has images of {len(found)} classes; give a folder with a sub-folder of images per class, at least two")
    return found


def _read(folder: Path, classes: Sequence[str], size: tuple[int, int] | None = None) -> Examples:
    files = [(file, label) for label, name in enumerate(classes) for file in image_files(folder / name)]
    return as_examples(opened([file for file, _ in files]), [label for _, label in files], str(folder), size)
