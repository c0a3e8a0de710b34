"""What is derived from weights at every call, by recipe: packed, factored or laid out anew."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tdpass.kernels.stage import Lanes, Stage
from tdpass.layers.identity_cache import IdentityCache

T = TypeVar("T")
DERIVED: IdentityCache[Any] = IdentityCache()


def _forget_fused(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Forget what was derived from weights that a fused step wrote: it raises no version."""
    del args, kwargs
    written = [weight for group in optimizer.param_groups if group.get("fused") for weight in group["params"]]
    if written and len(DERIVED):
        DERIVED.clear(written)


register_optimizer_step_post_hook(_forget_fused)


class Recipe(ABC, Generic[T]):
    """How something is derived from tensors; frozen, so that equal recipes share what they made."""

    @abstractmethod
    def make(self, tensors: Sequence[Tensor]) -> T:
        """What is derived, holding none of these tensors themselves."""


Tensors = tuple[Tensor, ...]


def derived(recipe: Recipe[T], tensors: Sequence[Tensor]) -> T:
    """What the recipe makes of these tensors, from the cache where they are as they were."""
    made: T = DERIVED.get(tensors, recipe, recipe.make)
    return made


@dataclass(frozen=True)
class PackChain(Recipe[Tensors]):
    """Packed weights of a chain, and its last layer's bias, with a batch-norm folded into both.

    Reads the weights, then the bias if `bias`, then with `norm` (its epsilon) mean, variance, and scale and
    shift as `affine` says.
    """

    stages: tuple[Stage, ...]
    lanes: Lanes
    transposed: tuple[bool, ...]
    bias: bool = False
    norm: float | None = None
    affine: tuple[bool, bool] = (False, False)

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        weights = [
            (w.t() if flip else w).reshape(stage.shape)
            for stage, w, flip in zip(self.stages, tensors, self.transposed, strict=False)
        ]
        rest = iter(tensors[len(self.stages) :])
        shift = next(rest).detach() if self.bias else None
        if self.norm is not None:
            weights[-1], shift = self._folded(weights[-1], shift, rest, self.norm)
        packed = tuple(
            stage.pack(weight, self.lanes).detach()
            for stage, weight in zip(self.stages, weights, strict=True)
        )
        return packed if shift is None else (*packed, shift.float())

    def _folded(
        self, weight: Tensor, shift: Tensor | None, rest: Iterator[Tensor], eps: float
    ) -> tuple[Tensor, Tensor]:
        mean, variance = next(rest).double(), next(rest).double()
        scale = (variance + eps).rsqrt()
        if self.affine[0]:
            scale = scale * next(rest).double()
        bias = scale * ((0 if shift is None else shift.double()) - mean)
        if self.affine[1]:
            bias = bias + next(rest).double()
        return weight.double() * scale[:, None, None, None], bias


@dataclass(frozen=True)
class ChannelsInnermost(Recipe[Tensors]):
    """A convolution weight with its channels innermost."""

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor.detach().contiguous(memory_format=torch.channels_last) for tensor in tensors)
