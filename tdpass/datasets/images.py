"""Pictures of any size and mode as one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdpass.datasets.base import Examples
from tdpass.errors import UsageError


def as_examples(pictures: Iterable[Any], labels: Sequence[int], name: str, size: tuple[int, int] | None = None) -> Examples:
    """Pillow images, all as `stacked` makes them, with their classes."""
    return Examples(stacked(pictures, name, size), torch.as_tensor(list(labels)).long())


def stacked(pictures: Iterable[Any], name: str, size: tuple[int, int] | None = None) -> Tensor:
    """Pillow images as bytes `[n, c, h, w]`: grey where the first is, else of three channels; of `size` (height, width), or the first's.

    Raises `UsageError` where there is none.
    """
    made: list[Tensor] = []
    mode = ""
    for picture in pictures:
        mode = mode or ("L" if picture.mode in ("1", "L", "I", "I;16") else "RGB")
        size = size or (picture.height, picture.width)
        shown = picture.convert(mode)
        shown = shown if (shown.height, shown.width) == size else shown.resize((size[1], size[0]))
        pixels = torch.from_numpy(np.array(shown, dtype=np.uint8))
        made.append(pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1))
    if not made:
        raise UsageError(f"{name!r} holds no image")
    return torch.stack(made).contiguous()
