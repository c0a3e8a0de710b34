"""Image classification sets of the Hugging Face hub, through the package `datasets`."""

from __future__ import annotations

import torch

from tdpass.datasets.base import Dataset, Examples, Source, measured, register_source
from tdpass.errors import UsageError
from tdpass.images import stacked
from tdpass.optional import is_installed
from tdpass.raw.hub import splits_of

_PREFIX = "hf:"
_SPLITS = {"train": ("train",), "test": ("test", "validation", "valid")}


def installed() -> bool:
    """Whether the package `datasets` is there."""
    return is_installed("datasets")


def split_of(name: str, split: str) -> Examples:
    """The `train` or `test` images of a set on the hub; raises `UsageError`, `InvalidModelError`."""
    found = _split(name, split)
    if found is None:
        raise UsageError(
            f"the data set {name!r} has no split {' or '.join(_SPLITS[split])}; make batches of it in Python"
        )
    return found


def _split(name: str, split: str) -> Examples | None:
    splits = splits_of(name)
    rows = next((splits[entry] for entry in _SPLITS[split] if entry in splits), None)
    if rows is None:
        return None
    kinds = {column: type(kind).__name__ for column, kind in rows.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if not images or not labels:
        columns = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise UsageError(
            f"the data set {name!r} needs a column of images and one of classes; it has {columns}; make "
            "batches of it in Python"
        )
    column = next((entry for entry in labels if entry in ("label", "labels", "fine_label")), labels[0])
    return Examples(stacked(rows[images[0]], name), torch.as_tensor(list(rows[column])).long())


@register_source
class HuggingFace(Source):
    """`hf:cifar10` and other sets with images and classes."""

    name = "hf"
    example = "hf:cifar10"

    def claims(self, text: str) -> bool:
        return text.startswith(_PREFIX)

    def open(self, text: str) -> Dataset:
        name = text.removeprefix(_PREFIX)
        return measured(text, split_of(name, "train"), _split(name, "test"))
