"""mse: squared error, each channel relative to its own spread."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.planner.answers import Answers
from tdpass.planner.comparisons.base import Comparison, normal, register_comparison

_LEAST_SPREAD = 1e-2
_ROWS_FOR_SPREAD = 8


@register_comparison
@dataclass(frozen=True, eq=False)
class ScaledError(Comparison):
    """Squared error over the squared spread of the channel, mean over channels; `scale` lies along `axis`.

    The spread is the standard deviation over all answers (the root mean square below eight values a
    channel).  Its square is raised by (1e-2 g)^2, g the geometric mean over the channels that vary, so that
    an error in a constant channel counts, but not without bounds.
    """

    name = "mse"
    axis: int | None = None
    scale: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    whole: float = 1.0

    @classmethod
    def fit(cls, answers: Answers) -> Self:
        """The channel axis from the answers, and the spread of each of its indices."""
        axis = answers.channel_axis()
        spread = answers.variance(axis, _ROWS_FOR_SPREAD)
        whole = (
            float(answers.variance(None, _ROWS_FOR_SPREAD))
            or answers.mean_of(lambda value: float(value.square().mean()))
            or 1.0
        )
        varies = spread > _LEAST_SPREAD**4 * spread.max()
        typical = float(spread[varies].log().mean().exp()) if bool(varies.any()) else whole
        return cls(axis, (spread + _LEAST_SPREAD**2 * typical).sqrt(), whole**0.5)

    @property
    def gain(self) -> float:
        return 1 / self.scale.numel()

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return self._squares(reference, output).mean(1)

    def count(self, reference: Tensor) -> int:
        return reference.numel() // (1 if self.axis is None else max(reference.shape[self.axis], 1))

    def by_channel(self, reference: Tensor, output: Tensor) -> Tensor | None:
        return None if self.axis is None else self._squares(reference, output).mean(0)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        return normal(reference, generator) / self._along(reference).to(reference.dtype)

    def _squares(self, reference: Tensor, output: Tensor) -> Tensor:
        """Relative squared errors as [rows, channels]."""
        squares = ((reference - output) / self._along(reference)).square()
        return squares.reshape(-1, 1) if self.axis is None else squares.movedim(self.axis, -1).flatten(0, -2)

    def _along(self, reference: Tensor) -> Tensor:
        """The scale, shaped to broadcast; the whole output's for another number of channels than was seen."""
        if self.axis is None or reference.shape[self.axis] != self.scale.numel():
            return torch.tensor(self.whole, dtype=torch.float64)
        shape = [1] * reference.dim()
        shape[self.axis] = -1
        return self.scale.reshape(shape)
