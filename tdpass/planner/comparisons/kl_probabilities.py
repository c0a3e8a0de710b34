"""kl_probabilities: probabilities of classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.planner.answers import Answers
from tdpass.planner.comparisons.base import normal, register_comparison
from tdpass.planner.comparisons.distribution import LEAST_PROBABILITY, Distribution, curvature, kl_terms


@register_comparison
@dataclass(frozen=True)
class Probabilities(Distribution):
    """KL(p || q) over `axis` as the sum of p log(p / q) - p + q."""

    name = "kl_probabilities"

    @classmethod
    def fit(cls, answers: Answers) -> Self:
        """Over the axis along which values sum to one, else over the last."""
        axis = answers.probability_axis()
        axis = -1 if axis is None else axis
        return cls(axis, answers.mean_of(lambda value: curvature(value, axis)))

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return kl_terms(reference, output).sum(self.axis).reshape(-1)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        direction = normal(reference, generator)
        return (direction - direction.mean(self.axis, keepdim=True)) / reference.clamp_min(LEAST_PROBABILITY)
