"""Data held in memory, as a loop wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.errors import UsageError
from tdpass.training.placement import world

Change = Callable[[Tensor, torch.Generator], Tensor]


@dataclass
class Batches:
    """Shuffled batches of `inputs[n, ...]` and `targets[n, ...]`, the same for the same seed and epoch.

    A rest smaller than `size` is left out. `change(inputs, generator)` prepares each batch: normalises,
    crops, flips.  With several processes each gets its part of every batch, so that together they see what
    one alone would.
    """

    inputs: Tensor
    targets: Tensor
    size: int = 128
    seed: int = 0
    change: Change | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not 1 <= self.size <= len(self.inputs):
            sizes = f"{len(self.inputs)} inputs, {len(self.targets)} targets and batches of {self.size}"
            raise UsageError(f"{sizes} do not fit; give as many of each, and smaller batches")

    def __len__(self) -> int:
        return len(self.inputs) // self.size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rank, size = world()
        for chosen in torch.split(torch.randperm(len(self.inputs), generator=generator), self.size)[
            : len(self)
        ]:
            inputs = self.inputs[chosen]
            if self.change is not None:
                inputs = self.change(inputs, generator)
            yield inputs[rank::size], self.targets[chosen][rank::size]
