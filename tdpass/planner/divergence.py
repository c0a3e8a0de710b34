"""How far one network's output is from another's, per sample; no labels needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tdpass.errors import InvalidModelError, UsageError
from tdpass.registry import Registry

Measure = Callable[[Tensor, Tensor], Tensor]
MEASURES: Registry[Measure] = Registry("divergence")


def _kl(reference: Tensor, output: Tensor) -> Tensor:
    """KL(p || q) of the softmax over the last axis, mean over all axes but the first."""
    p, q = F.log_softmax(reference, -1), F.log_softmax(output, -1)
    return (p.exp() * (p - q)).sum(-1).reshape(reference.shape[0], -1).mean(1)


def _mse(reference: Tensor, output: Tensor) -> Tensor:
    """Squared error relative to the reference's mean square around its mean over samples."""
    scale = (reference - reference.mean(0, keepdim=True)).square().mean().clamp_min(1e-30)
    return (reference - output).square().flatten(1).mean(1) / scale


def _cosine(reference: Tensor, output: Tensor) -> Tensor:
    """One minus the cosine of the angle between the flattened outputs."""
    return 1 - F.cosine_similarity(reference.flatten(1), output.flatten(1), dim=1)


for _name, _measure in (("kl", _kl), ("mse", _mse), ("cosine", _cosine)):
    MEASURES.add(_name, _measure)


@dataclass(frozen=True)
class Divergence:
    """A named measure on the first floating-point output of a network, or on what `select` makes of its outputs.

    `auto` is `kl` for outputs of shape [samples, classes] and `mse` for all others.
    """

    name: str = "auto"
    select: Callable[[object], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.name != "auto" and self.name not in MEASURES:
            raise UsageError(f"unknown divergence {self.name!r}; known: auto, {', '.join(MEASURES.names())}")

    def output(self, outputs: object) -> Tensor:
        """The tensor that is compared."""
        if self.select is not None:
            return self.select(outputs)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0:
                return leaf
        raise InvalidModelError("the model returns no floating-point tensor to compare; pass divergence=Divergence('mse', select=...)")

    def resolve(self, reference: Tensor) -> str:
        """The measure's name for outputs like `reference`."""
        if self.name != "auto":
            return self.name
        return "kl" if reference.dim() == 2 and reference.shape[1] > 1 else "mse"

    def __call__(self, reference: Tensor, output: Tensor) -> Tensor:
        """Divergence per sample, float64."""
        return MEASURES.get(self.resolve(reference))(reference.double(), output.double())

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """A random direction in output space for Gauss-Newton gradients: centred over classes for logits, plain otherwise."""
        direction = torch.randn(reference.shape, generator=generator, dtype=reference.dtype)
        return direction - direction.mean(-1, keepdim=True) if self.resolve(reference) == "kl" else direction
