"""kl: class scores, as the distributions that their softmax is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from tdpass.planner.answers import Answers
from tdpass.planner.comparisons.base import normal, register_comparison
from tdpass.planner.comparisons.distribution import Distribution, curvature


@register_comparison
@dataclass(frozen=True)
class ClassScores(Distribution):
    """KL(p || q) of the softmax over `axis`; log-probabilities are scores as well."""

    name = "kl"

    @classmethod
    def fit(cls, answers: Answers) -> Self:
        """Over the axis of log-probabilities where there is one, else over the last."""
        axis = answers.log_probability_axis()
        axis = -1 if axis is None else axis
        return cls(axis, answers.mean_of(lambda value: curvature(value.softmax(axis), axis)))

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(reference, self.axis), F.log_softmax(output, self.axis)
        p = log_p.exp()
        # 0 where p is 0 even if its logarithm is not finite
        return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(self.axis).reshape(-1)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        direction = normal(reference, generator)
        return direction - direction.mean(self.axis, keepdim=True)
