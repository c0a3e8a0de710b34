"""one_sign: the weights of a fragment share a sign."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.constraints.support import masked
from tdpass.errors import PlanError, UsageError


@register_constraint
@dataclass(frozen=True, eq=False)
class OneSign(Constraint):
    """In every run of `run` weights along a row of the `o x (i h w)` matrix all have one sign.

    The rest are zero (FORMS, Yuan et al., ISCA 2021). The projection keeps of each run the sign with more
    energy, which is exact; positive where both have as much.  `signs`, one for each run, gives them instead.
    """

    run: int
    signs: Tensor | None = None
    name = "one_sign"

    def __post_init__(self) -> None:
        if self.run < 1:
            raise UsageError(f"run={self.run} weights that share a sign are too few; give 1 or more")

    def project(self, weight: Tensor) -> Tensor:
        return masked(weight, self.mask(weight))

    def mask(self, weight: Tensor) -> Tensor:
        """Which weights have the sign of their run, as booleans of the weight's shape."""
        wide = checked(weight)
        return (wide.flatten(1) * self._of_weights(wide) >= 0).reshape(weight.shape)

    def frozen(self, weight: Tensor) -> OneSign:
        return self if self.signs is not None else replace(self, signs=self._found(checked(weight)))

    def _of_weights(self, weight: Tensor) -> Tensor:
        """The sign of each weight's run, as a matrix."""
        matrix = weight.flatten(1)
        signs = self._found(weight) if self.signs is None else self.signs.to(matrix)
        if signs.shape != (len(matrix), math.ceil(matrix.shape[1] / self.run)):
            raise PlanError(
                f"signs of shape {tuple(signs.shape)} do not fit a weight of shape {tuple(weight.shape)} in "
                f"runs of {self.run}"
            )
        return signs.repeat_interleave(self.run, 1)[:, : matrix.shape[1]]

    def _found(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        runs = math.ceil(matrix.shape[1] / self.run)
        parts = F.pad(matrix, (0, runs * self.run - matrix.shape[1])).reshape(len(matrix), runs, self.run)
        up, down = (part.square().sum(2) for part in (parts.clamp_min(0), parts.clamp_max(0)))
        return torch.where(up >= down, 1.0, -1.0).to(matrix)

    def __str__(self) -> str:
        return f"one sign in runs of {self.run}"
