"""cosine: the angle between embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.planner.comparisons.base import Unfitted, normal, register_comparison


@register_comparison
@dataclass(frozen=True)
class Cosine(Unfitted):
    """One minus the cosine of the angle between outputs, all axes but the first flattened."""

    name = "cosine"

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(self._flat(reference), self._flat(output), dim=1)

    def count(self, reference: Tensor) -> int:
        return reference.shape[0] if reference.dim() > 1 else 1

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        flat = self._flat(reference)
        length = flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit = flat / length
        direction = normal(flat, generator) / length
        across: Tensor = direction - (direction * unit).sum(1, keepdim=True) * unit
        return across.reshape(reference.shape)

    def _flat(self, value: Tensor) -> Tensor:
        return (value[None] if value.dim() < 2 else value).flatten(1)
