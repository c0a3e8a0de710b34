"""kl_bernoulli: probabilities of yes, each by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.planner.comparisons.base import Unfitted, normal, register_comparison
from tdpass.planner.comparisons.distribution import kl_terms


@register_comparison
@dataclass(frozen=True)
class Bernoulli(Unfitted):
    """KL of the yes-or-no distribution that each element is the probability of; an element is a row."""

    name = "kl_bernoulli"

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return (
            torch.stack([kl_terms(reference, output), kl_terms(1 - reference, 1 - output)]).sum(0).reshape(-1)
        )

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        return normal(reference, generator) / (reference * (1 - reference)).clamp_min(1e-4).sqrt()
