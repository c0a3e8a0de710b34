"""n_of_m: at most n of every m neighbours are not zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.constraints.support import Support, masked
from tdpass.errors import UsageError


@register_constraint
@dataclass(frozen=True)
class NOfM(Constraint):
    """At most `n` of every `m` weights in a row of the `o x (i h w)` matrix are not zero.

    A last, shorter run has at most n too. The projection keeps the largest of each run, which is exact; of
    equal ones the first (Mishra et al. 2021 for 2 of 4).
    """

    n: int
    m: int
    name = "n_of_m"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise UsageError(f"n={self.n} of m={self.m} is not a pattern; n is from 1 to m, such as 2 of 4")

    def project(self, weight: Tensor) -> Tensor:
        return masked(weight, self.mask(weight))

    def mask(self, weight: Tensor) -> Tensor:
        """Which weights the projection keeps, as booleans of the weight's shape."""
        matrix = checked(weight).flatten(1).abs()
        o, d = matrix.shape
        runs = math.ceil(d / self.m)
        cells = F.pad(matrix, (0, runs * self.m - d), value=-1.0).reshape(o, runs, self.m)
        kept = cells.sort(dim=2, descending=True, stable=True).indices[:, :, : self.n]
        mask = torch.zeros_like(cells, dtype=torch.bool).scatter_(2, kept, value=True)
        return mask.reshape(o, -1)[:, :d].reshape(weight.shape)

    def frozen(self, weight: Tensor) -> Support:
        return Support(self.mask(weight))

    def __str__(self) -> str:
        return f"{self.n} of {self.m}"
