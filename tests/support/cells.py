"""The cells of the table of support: a kind of layer through a front end, what becomes of it, and why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpass.models.base import Batch

FRONT_ENDS = ("torch", "torch.export", "onnx")
Sizes = tuple[int, ...]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2


@dataclass(frozen=True)
class Cell:
    """One layer through one front end.

    `make` makes the model that it is in, `fed` what that is called with; `sites` are the names of the sites
    that are to be found, `left` a part of the reason why something with a weight is left alone.  Answers lie on a
    grid of that `step`, to which other roundings of the same may make one of difference.
    """

    layer: str
    front_end: str
    make: Callable[[], Any]
    fed: Callable[[], tuple[Tensor, ...]]
    sites: tuple[str, ...] = ()
    left: str = ""
    step: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.layer}-{self.front_end}".replace(" ", "_")

    @property
    def batch(self) -> Batch:
        return Batch(self.fed())

    @property
    def text(self) -> str:
        """What the table says."""
        if not self.left:
            return "yes"
        return f"in part: {self.left}" if self.sites else f"left: {self.left}"


CELLS: dict[tuple[str, str], Cell] = {}


def add(cell: Cell) -> None:
    """Put a cell in the table; each has one place."""
    key = cell.layer, cell.front_end
    if key in CELLS:
        raise KeyError(key)
    CELLS[key] = cell
