"""Data sets of torchvision, fetched to the cache folder at first use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tdpass.datasets.base import Dataset, Examples, Source, measured, register_source
from tdpass.errors import InvalidModelError, UsageError
from tdpass.files import cache_folder
from tdpass.optional import is_installed, optional

_PREFIX = "torchvision:"


def installed() -> bool:
    """Whether torchvision is there."""
    return is_installed("torchvision")


def split_of(name: str, split: str) -> Examples:
    """The `train` or `test` images of a set that torchvision holds in memory.

    Raises `UsageError`, `InvalidModelError`.
    """
    made = getattr(optional("torchvision.datasets", "torchvision", f"the data set {name!r}"), name, None)
    if made is None:
        raise UsageError(
            f"torchvision has no data set {name!r}; write it as torchvision does, such as torchvision:CIFAR10"
        )
    try:
        found: Any = made(str(cache_folder() / "datasets"), train=split == "train", download=True)
        pixels, labels = found.data, found.targets
    except (TypeError, AttributeError):
        raise UsageError(
            f"torchvision's {name} is not one of images in memory with a train and a test split; make "
            "batches of it in Python"
        ) from None
    except (OSError, RuntimeError) as error:
        raise InvalidModelError(f"torchvision cannot fetch {name}: {error}") from None
    images = torch.as_tensor(np.asarray(pixels))
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Examples(images, torch.as_tensor(labels).long())


@register_source
class Torchvision(Source):
    """`torchvision:CIFAR10` and other sets that torchvision holds in memory."""

    name = "torchvision"
    example = "torchvision:CIFAR10"

    def claims(self, text: str) -> bool:
        return text.startswith(_PREFIX)

    def open(self, text: str) -> Dataset:
        name = text.removeprefix(_PREFIX)
        return measured(text, split_of(name, "train"), split_of(name, "test"))
