"""Changes of training images that leave their class as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Every image moved by up to `shift` pixels each way over black; `flip` mirrors it half of the time."""

    shift: int = 0
    flip: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """`[n, c, h, w]` to the same shape, each image changed at random."""
        if not self.shift and not self.flip:
            return images
        count, _, height, width = images.shape
        padded = F.pad(images, (self.shift,) * 4)
        top, left = (torch.randint(0, 2 * self.shift + 1, (count, 1), generator=generator) for _ in range(2))
        rows, columns = top + torch.arange(height), torch.arange(width).repeat(count, 1)
        if self.flip:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        chosen = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], (left + columns)[:, None, :]]
        return chosen.permute(0, 3, 1, 2).contiguous()


UNCHANGED = Augment()
